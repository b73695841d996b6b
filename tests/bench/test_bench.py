"""The benchmark compares like with like: all contenders are the same model, and one that is not is refused."""

from __future__ import annotations

import importlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teratron.config import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

from job import CHECKS, Gate, Job
from peers import OURS, PEERS, check, install
from race import Lane, Settings, check_same, job, race
from train import record, speed_ratio
from workloads import SEED, WORKLOADS, Workload, initial_parts, write_inputs


def tiny(name: str) -> Workload:
    """A workload of the same style in miniature; its vocabulary is not a multiple of the padding."""
    sizes = {"ffn": 48, "kv_heads": 2} if name == "C" else {"ffn": 128, "kv_heads": 4}
    shape = replace(WORKLOADS[name].shape, layers=2, hidden=32, heads=4, seq_length=16, vocab_size=97, **sizes)
    return replace(WORKLOADS[name], shape=shape, batch=2)


def telling_parts(workload: Workload) -> dict[str, Tensor]:
    """Weights large enough, and biases and norms random too, so that any part put in the wrong place changes the loss."""
    generator = torch.Generator().manual_seed(SEED)
    return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in initial_parts(workload.model).items()}


class EnoughError(Exception):
    """The loop has made the steps that a test wants."""


class Recorder(Gate):
    """A gate that keeps every loss, and ends the loop after some."""

    def __init__(self, job: Job, steps: int) -> None:
        super().__init__(job, io.StringIO())
        self.wanted = steps

    def passed(self, loss: Tensor | float) -> None:
        self.losses.append(float(loss))
        if len(self.losses) == self.wanted:
            raise EnoughError


def learn(name: str, workload: Workload, folder: Path, *, precision: str = "fp32", steps: int = CHECKS) -> Recorder:
    """A contender's first steps."""
    peer = PEERS.get(name, OURS)
    told = job(workload, peer, str(folder), Settings(precision))
    recorder = Recorder(told, steps)
    with pytest.raises(EnoughError):
        importlib.import_module(f"contenders.{peer.contender}").train(told, recorder)
    return recorder


CASES = [
    (workload, peer)
    for workload in ("A", "C", "char")
    for peer in ("nanogpt", "nanogpt-fused", "transformers")
    if PEERS[peer].can_run(WORKLOADS[workload])
]


@pytest.mark.parametrize(("name", "peer"), CASES)
def test_peer_is_the_same_model_and_learns_the_same(name: str, peer: str, tmp_path: Path) -> None:
    if peer == "transformers":
        pytest.importorskip("transformers")
    workload = tiny(name)
    write_inputs(tmp_path, workload, telling_parts(workload))
    ours, theirs = learn("teratron", workload, tmp_path), learn(peer, workload, tmp_path)
    assert theirs.parameters == ours.parameters
    assert ours.losses[0] > 4.7  # weights that say something else than the uniform ln 97 = 4.57
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)


@pytest.mark.parametrize("peer", ["teratron", "nanogpt"])
def test_bf16_is_near_fp32(peer: str, tmp_path: Path) -> None:
    workload = tiny("A")
    write_inputs(tmp_path, workload, telling_parts(workload))
    exact, rounded = (learn(peer, workload, tmp_path, precision=precision, steps=1).losses for precision in ("fp32", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("peer", ["teratron", "nanogpt"])
def test_steps_after_the_checks_are_on_other_batches(peer: str, tmp_path: Path) -> None:
    """What the rounds time learns as the checks did, from what its own sampler draws."""
    workload = tiny("A")
    write_inputs(tmp_path, workload, telling_parts(workload))
    losses = learn(peer, workload, tmp_path, steps=CHECKS + 3).losses
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("name", ["A", "C"])
def test_job_survives_its_text(name: str, tmp_path: Path) -> None:
    told = job(WORKLOADS[name], PEERS["nanogpt-fused"], str(tmp_path), Settings("bf16", switches=True))
    assert Job.parse(told.text()) == told


def test_race_measures_every_contender() -> None:
    workload = tiny("char")
    result = race(workload, ["nanogpt"], Settings(steps=2, rounds=2, switches=True))
    assert [lane.name for lane in result.lanes] == ["teratron", "nanogpt"]
    for lane in result.lanes:
        assert len(lane.losses) == CHECKS
        assert len(lane.seconds) == 2
        assert min(lane.seconds) > 0
        assert lane.memory > lane.imports > 2**20
    numbers = record(workload, result)
    assert numbers["contenders"]["teratron"]["ours_is"] == 1
    assert numbers["flops_per_token"] > 6 * 2 * 12 * 32**2  # 6 for each weight of two blocks, and more


def test_contender_that_dies_says_why() -> None:
    workload = replace(tiny("char"), batch=0)
    with pytest.raises(UserError, match=r"(?s)teratron ended with exit code 1.*global_batch"):
        race(workload, [], Settings())


def test_ratio_is_taken_within_rounds() -> None:
    """A machine that slows down tenfold between rounds does not change it."""
    ours, theirs = Lane("ours", 1, [1.0], 0, [1.0, 10.0, 10.0]), Lane("theirs", 1, [1.0], 0, [2.0, 20.0, 20.0])
    assert speed_ratio(ours, theirs) == 2


@pytest.mark.parametrize(("parameters", "losses"), [(11, [4.0, 3.0]), (10, [4.001, 3.0]), (10, [4.0, 3.01]), (10, [float("nan"), 3.0])])
def test_another_model_is_refused(parameters: int, losses: list[float]) -> None:
    right = Lane("teratron", 10, [4.0, 3.0], 0)
    check_same([right, Lane("same", 10, [4.00001, 3.0001], 0)], "fp32")
    with pytest.raises(UserError, match="nanogpt has"):
        check_same([right, Lane("nanogpt", parameters, losses, 0)], "fp32")


@pytest.mark.parametrize(("peer", "message"), [("nanogtp", "expected some of"), ("transformers", "no model like workload char")])
def test_peer_that_cannot_run_is_refused(peer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(peer, WORKLOADS["char"])


def test_peers_have_their_module_and_their_needs() -> None:
    bench = Path(__file__).resolve().parents[2] / "bench"
    for peer in PEERS.values():
        assert (bench / "contenders" / f"{peer.contender}.py").is_file()
        assert not peer.environment or (bench / "requirements" / f"{peer.environment}.txt").is_file()
    with pytest.raises(UserError, match="expected one of"):
        install("nanogtp")
