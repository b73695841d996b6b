"""The benchmark compares like with like: all contenders are the same model, and one that is not is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teratron.config import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

from peers import PEERS, Contender, build, check_peer
from race import CHECKS, Lane, check_same, race
from train import record, speed_ratio
from workloads import WORKLOADS, Workload, initial_parts, random_rows, write_tokens


def tiny(name: str) -> Workload:
    """A workload of the same style in miniature; its vocabulary is not a multiple of the padding."""
    model = replace(WORKLOADS[name].model, layers=2, hidden=32, heads=4, seq_length=16, vocab_size=97)
    if name == "C":
        model = replace(model, kv_heads=2, ffn=48)
    return replace(WORKLOADS[name], model=model, batch=2)


def telling_parts(workload: Workload) -> dict[str, Tensor]:
    """Weights large enough, and biases and norms random too, so that any part put in the wrong place changes the loss."""
    generator = torch.Generator().manual_seed(3)
    return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in initial_parts(workload.model).items()}


def contender(name: str, workload: Workload, folder: Path, precision: str = "fp32") -> Contender:
    write_tokens(folder / "tokens", workload)
    return build(name, workload, folder / "tokens", telling_parts(workload), precision, torch.device("cpu"))


def able(workload: str) -> list[str]:
    return [peer for peer in PEERS if workload != "char" or peer.startswith("nanogpt")]


CASES = [(workload, peer) for workload in ("A", "C", "char") for peer in able(workload)]


@pytest.mark.parametrize(("name", "peer"), CASES)
def test_peer_is_the_same_model_and_learns_the_same(name: str, peer: str, tmp_path: Path) -> None:
    if peer.startswith("transformers"):
        pytest.importorskip("transformers")
    workload = tiny(name)
    ours, theirs = contender("teratron", workload, tmp_path), contender(peer, workload, tmp_path)
    assert theirs.parameters() == ours.parameters()
    losses = [[one.learn(random_rows(workload, seed)) for one in (ours, theirs)] for seed in (0, 1, 0)]
    assert losses[0][0] > 4.7  # weights that say something else than the uniform ln 97 = 4.57
    assert losses[0][1] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[2][0] != pytest.approx(losses[0][0], rel=1e-4)  # two updates are seen, and they are the same updates
    assert losses[2][1] == pytest.approx(losses[2][0], rel=1e-5)


@pytest.mark.parametrize("peer", ["teratron", "nanogpt"])
def test_bf16_is_near_fp32(peer: str, tmp_path: Path) -> None:
    workload = tiny("A")
    exact, rounded = (contender(peer, workload, tmp_path, precision).learn(random_rows(workload, 0)) for precision in ("fp32", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_own_sampler_steps_learn(tmp_path: Path) -> None:
    """`step`, which the rounds time, changes the weights just as `learn` does."""
    workload = tiny("A")
    for name in ("teratron", "nanogpt"):
        one = contender(name, workload, tmp_path)
        before = one.learn(random_rows(workload, 0))
        for _ in range(3):
            one.step()
        assert one.learn(random_rows(workload, 0)) != pytest.approx(before, rel=1e-5)


def test_race_measures_every_contender() -> None:
    workload = tiny("char")
    result = race(workload, ["nanogpt"], precision="fp32", device="cpu", threads=1, steps=2, rounds=2)
    assert [lane.name for lane in result.lanes] == ["teratron", "nanogpt"]
    for lane in result.lanes:
        assert len(lane.losses) == CHECKS
        assert len(lane.seconds) == 2
        assert min(lane.seconds) > 0
        assert lane.memory > lane.imports > 2**20
    numbers = record(workload, result)
    assert numbers["contenders"]["teratron"]["ours_is"] == 1
    assert numbers["flops_per_token"] > 6 * 2 * 12 * 32**2  # 6 for each weight of two blocks, and more


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


@pytest.mark.parametrize(("peer", "message"), [("nanogtp", "expected some of"), ("transformers", "always has biases")])
def test_peer_that_cannot_run_is_refused(peer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_peer(peer, WORKLOADS["char"])
