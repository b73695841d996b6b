"""Where time and memory go on one rank; who is a straggler; that watching changes no number."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import events, losses, tiny, write_text

from teratron.parallel.mesh import Mesh
from teratron.train import Trainer
from teratron.train.engine import Engine
from teratron.train.metrics import Silence
from teratron.train.profiling import DEAREST, REQUEST, Tracer
from teratron.train.timing import memory_in_use, state_bytes, stragglers


@pytest.mark.parametrize(
    ("own", "stages", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.4], 1, {}),
        ([1.0, 1.0, 1.0, 3.0], 1, {3: 3.0}),
        ([1.0, 2.0], 1, {1: 2.0}),
        ([1.0, 1.0, 9.0, 9.0], 2, {}),
        ([1.0, 1.0, 9.0, 18.0], 2, {3: 2.0}),
        ([5.0], 1, {}),
        ([0.0, 0.0, 1.0], 1, {}),
    ],
)
def test_a_straggler_is_slow_among_the_ranks_of_its_stage(own: list[float], stages: int, slow: dict[int, float]) -> None:
    assert stragglers(own, lambda rank: rank * stages // len(own)) == slow


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", (4, 4, 8)), ("fp64", (8, 8, 16)), ("bf16", (2, 2 + 4, 4 + 8))])
def test_state_is_counted_by_category(precision: str, bytes_each: tuple[int, int, int]) -> None:
    config = tiny("unread.txt", train__precision=precision).override({"model.vocab_size": 16})
    engine = Engine(config, Mesh())
    count = sum(bucket.weights.numel() for bucket in engine.flat.buckets)
    assert state_bytes(engine.optimizer) == tuple(count * size for size in bytes_each)


def test_memory_in_use_grows_with_a_tensor() -> None:
    before = memory_in_use(torch.device("cpu"))
    held = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 2**26), np.float32)).add_(1)  # not of what this process has freed and kept
    after = memory_in_use(torch.device("cpu"))
    assert after[0] - before[0] > held.nbytes / 2
    assert after[1] >= after[0]


def test_every_tenth_step_and_the_last_tell_of_all_ranks(tmp_path: Path) -> None:
    config = tiny(write_text(tmp_path / "text.txt"), train__steps=6, log__every=4)
    Trainer(config, tmp_path / "run", device="cpu", echo=False).train()
    told = events(tmp_path / "run", "ranks")
    assert [event["step"] for event in told] == [4, 6]
    steps = events(tmp_path / "run", "step")
    mean = sum(event["seconds"] - event["communication"] for event in steps[:4]) / 4
    assert told[0]["seconds"] == [pytest.approx(mean, rel=1e-3)]
    assert told[0]["data"] == pytest.approx(sum(event["data"] for event in steps[:4]) / 4)
    memory = told[0]["memory"]
    assert memory["now"] == sum(memory[name] for name in ("weights", "gradients", "optimizer", "rest"))
    assert all(0 <= event["data"] <= event["seconds"] for event in steps)
    assert all(event["communication"] == 0 for event in steps)


def test_a_traced_step_leaves_files_a_table_and_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    Trainer(tiny(text), tmp_path / "plain", device="cpu", echo=False).train()
    Trainer(tiny(text, log__profile_step=2), tmp_path / "run", device="cpu").train()
    (told,) = events(tmp_path / "run", "profile")
    assert (told["step"], told["folder"]) == (2, "profile/step-00000002")
    folder = tmp_path / "run" / told["folder"]
    assert {path.name for path in folder.iterdir()} == {"rank-0.json", "rank-0.txt"}
    times = [entry["ms"] for entry in told["operations"]]
    assert times == sorted(times, reverse=True)
    assert 0 < len(times) <= DEAREST
    table = (folder / "rank-0.txt").read_text()
    assert all(entry["name"] in table for entry in told["operations"])
    assert table in capsys.readouterr().out
    assert losses(tmp_path / "plain") == losses(tmp_path / "run")


def test_a_file_asks_for_a_trace_once_and_rank_0_looks(tmp_path: Path) -> None:
    (tmp_path / REQUEST).touch()
    assert not Tracer(tmp_path, 0, 1, Silence(), print).asked()
    tracer = Tracer(tmp_path, 0, 0, Silence(), print)
    assert tracer.asked()
    assert not (tmp_path / REQUEST).exists()
    assert not tracer.asked()


def test_the_step_after_the_request_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(write_text(tmp_path / "text.txt")), tmp_path / "run", device="cpu", echo=False)
    (tmp_path / "run" / REQUEST).touch()
    trainer.train()
    assert [event["step"] for event in events(tmp_path / "run", "profile")] == [2]
