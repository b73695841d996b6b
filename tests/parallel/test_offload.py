"""Masters and moments that lie elsewhere between updates (`parallel.offload`): the numbers are the plain run's bit for bit."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import Keys, Learnt, Outcome, batch_of, config_of, outcome, share, train
from pool import pool
from tiny import assert_same_state, tiny, write_text

from teratron.config import ParallelConfig, UserError
from teratron.parallel.boxes import nothing
from teratron.parallel.mesh import Mesh
from teratron.parallel.offload import Disk, Home, HostMemory, home_of
from teratron.plan.dryrun import dry_run
from teratron.train import engine, stash
from teratron.train.engine import Engine
from teratron.train.trainer import Trainer

pytestmark = pytest.mark.xdist_group("ranks")


def learnt(keys: Keys, home: Home | None) -> Learnt:
    """What a few steps of a single process come to."""
    config = config_of(keys)
    made = Engine(config, Mesh(), home=home)
    made.optimizer.initialise(config.train.seed)
    done = [made.step(share(made, batch_of(config, step)), step=step, number=step, lr=0.01) for step in (1, 2, 3)]
    return [tally.loss() for tally, _ in done], [float(norm) for _, norm in done], made.optimizer.pieces()


def of_rank(rank: int, ranks: int, keys: Keys) -> Learnt:
    """The same on one rank of several."""
    losses, norms, pieces = train(rank, ranks, keys)
    return losses, norms, [replace(piece, done=nothing) for piece in pieces]  # files do not travel between processes


def assert_identical(found: Outcome, expected: Outcome) -> None:
    assert (found.losses, found.norms) == (expected.losses, expected.norms)
    assert found.state.keys() == expected.state.keys()
    assert [name for name in expected.state if not torch.equal(found.state[name], expected.state[name])] == []


@pytest.mark.parametrize("where", ["disk", "host"])
@pytest.mark.parametrize(
    "keys",
    [
        {"optim.name": "adamw", "train.precision": "fp32"},
        {"optim.name": "adamw", "train.precision": "bf16", "optim.moments": "bf16"},
        {"optim.name": "lamb", "train.precision": "bf16"},
        {"optim.name": "muon"},
        {"optim.name": "adafactor", "train.precision": "bf16"},
        {"optim.name": "lion"},
        {"optim.name": "schedule_free", "optim.schedule": "constant"},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_every_optimizer_computes_the_same(tmp_path: Path, keys: Keys, where: str) -> None:
    """Host memory stands in for that beside a GPU: everything is copied there and back, as between two devices."""
    home = Disk("cpu", tmp_path) if where == "disk" else HostMemory("cpu")
    assert_identical(outcome([learnt(keys, home)]), outcome([learnt(keys, Home())]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharded", ["optimizer", pytest.param("gradients", marks=pytest.mark.slow), "parameters"])
def test_ranks_that_share_the_state_compute_the_same(tmp_path: Path, sharded: str) -> None:
    keys: Keys = {"parallel.shard": sharded, "train.precision": "fp32"}
    disk: Keys = {"parallel.offload": "disk", "parallel.offload_folder": str(tmp_path)}
    found, expected = (outcome(pool().run(of_rank, 2, keys | more)) for more in (disk, {}))
    assert_identical(found, expected)


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
@pytest.mark.parametrize("where", ["disk", "host"])
def test_activations_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, recomputed: str) -> None:
    """Over several micro-batches, with dropout; a test's small tensors go out too."""
    monkeypatch.setattr(stash, "LEAST", 1)
    keys: Keys = {"train.micro_batch": 2, "train.recompute": recomputed, "train.precision": "fp32"}
    home = Disk("cpu", tmp_path) if where == "disk" else HostMemory("cpu")
    made = []
    monkeypatch.setattr(home, "keep", lambda kept, changed: made.append(type(home).keep(home, kept, changed)))
    plain = outcome([learnt(keys, Home())])
    monkeypatch.setattr(engine, "home_of", lambda *_: home)
    assert_identical(outcome([learnt(keys, None)]), plain)
    blocks, steps, micro_batches = 2, 3, 4
    assert len(made) >= blocks * steps * micro_batches


def test_a_run_goes_on_with_and_without(tmp_path: Path) -> None:
    """Files, then memory, then files again, each from a checkpoint of the other: the run that had none."""
    text = write_text(tmp_path / "text.txt")
    Trainer(tiny(text, optim__name="schedule_free", optim__schedule="constant"), tmp_path / "plain", device="cpu", echo=False).train()
    for steps, offload in ((2, "disk"), (4, "none"), (6, "disk")):
        keys = {"optim__name": "schedule_free", "optim__schedule": "constant", "parallel__offload": offload}
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / "moved" / "live.toml").write_text(f"stop_step = {steps}" if steps < 6 else "")
        Trainer(tiny(text, **keys), tmp_path / "moved", device="cpu", echo=False).train()
    assert_same_state(tmp_path / "moved", tmp_path / "plain")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much of a process's memory files are")
def test_what_is_done_with_leaves_the_process(tmp_path: Path) -> None:
    home = Disk("cpu", tmp_path)
    kept = home.zeros(2**24, torch.float32)
    before = mapped_memory()
    kept.fill_(3)
    assert mapped_memory() - before > 32 * 2**10
    home.done([kept])
    assert mapped_memory() - before < 16 * 2**10
    home.soon([kept])
    assert torch.equal(home.bring(kept), torch.full((2**24,), 3.0))
    home.clear(kept)
    assert not kept.any()


def mapped_memory() -> int:
    """KiB of files, on disk or in memory, that are mapped and present in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"parallel.offload = cpu on a CPU.*parallel.offload disk"):
        home_of(ParallelConfig(offload="cpu"), cpu, tmp_path)
    with pytest.raises(UserError, match=r"parallel.offload_folder = .*nowhere: no such folder"):
        home_of(ParallelConfig(offload="disk", offload_folder=str(tmp_path / "nowhere")), cpu, tmp_path)
    with pytest.raises(UserError, match=r"no file of [\d,]+ MiB can be made.*parallel.offload_folder"):
        Disk(cpu, tmp_path).zeros(2**50, torch.float32)


def test_a_dry_run_tells_what_lies_elsewhere() -> None:
    """Of bfloat16 weights: twelve bytes a parameter that the device has no more."""
    keys: Keys = {"train.precision": "bf16"}
    found, expected = (dry_run(config_of(keys | more), 1, 0, partial(Engine, home=Home())) for more in ({"parallel.offload": "disk"}, {}))
    assert found.state["offloaded"] == found.peak["offloaded"] == expected.state["optimizer"] > 0
    assert expected.total - found.total == found.state["offloaded"]
