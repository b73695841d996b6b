"""Saving beside training: the same checkpoints as while it waits, errors that reach all, and the newest good one wherever it lies."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_state, events, state, tiny, write_text

from teratron.checkpoint import memory, open_checkpoint
from teratron.checkpoint.background import Background
from teratron.config import CheckpointConfig, Config, UserError
from teratron.train import Trainer, saving
from teratron.train.engine import Engine
from teratron.train.guard import Guard
from teratron.train.saving import FIRST, Interval, Place, Save, best_interval

PATIENCE = 60
"""Seconds after which a thread that does not come has hung."""


@pytest.fixture(autouse=True)
def _memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(memory, "PLACE", tmp_path / "shm")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def train(config: Config, run: Path, **keys: Any) -> None:
    Trainer(config, run, device="cpu", echo=False, **keys).train()


def steps_on_disk(run: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(run / "checkpoints"))


def cut_off(monkeypatch: pytest.MonkeyPatch, config: Config, run: Path, step: int) -> None:
    """Train as far as the beginning of a step, where the process is interrupted for good."""
    original = Engine.step

    def stepped(engine: Engine, *args: Any, **keys: Any) -> Any:
        if keys["step"] == step:
            raise KeyboardInterrupt
        return original(engine, *args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepped)
        with pytest.raises(KeyboardInterrupt):
            train(config, run)


def test_what_is_written_beside_training_is_what_was_when_it_began(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer of step 2 is held back until step 4 is done: the checkpoint is that of a run that waits for each."""
    keys = {"checkpoint__keep": 0, "checkpoint__every": 2, "train__eval_every": 0}
    train(tiny(text, checkpoint__asynchronous=False, **keys), tmp_path / "waits")
    done, save, step = threading.Event(), saving.save_training, Engine.step

    def late(run: Path, config: Config, pieces: Any, state: Any, *more: Any) -> Path:
        assert done.wait(PATIENCE) or state.step != 2
        return save(run, config, pieces, state, *more)

    def stepped(engine: Engine, *args: Any, **keys: Any) -> Any:
        result = step(engine, *args, **keys)
        if keys["step"] == 4:
            done.set()
        return result

    monkeypatch.setattr(saving, "save_training", late)
    monkeypatch.setattr(Engine, "step", stepped)
    train(tiny(text, **keys), tmp_path / "beside")
    for step_number in (2, 4, 6):
        a, b = (open_checkpoint(tmp_path / run / "checkpoints" / f"step-{step_number:08d}").load() for run in ("waits", "beside"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    told = events(tmp_path / "beside", "save")
    assert [(event["step"], event["place"]) for event in told] == [(2, "disk"), (4, "disk"), (6, "disk")]
    assert all(0 < event["stall"] <= event["seconds"] or event["step"] != 2 for event in told)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_ends_the_run_with_a_sentence(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    original = saving.save_training

    def full(run: Path, config: Config, pieces: Any, state: Any, *more: Any) -> Path:
        if state.step == 4:
            raise UserError("disk full")
        return original(run, config, pieces, state, *more)

    config = tiny(text, checkpoint__asynchronous=asynchronous, train__steps=200, train__eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_training", full)
        with pytest.raises(UserError, match="disk full"):
            train(config, tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [2]
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [2]


def test_a_save_under_way_is_finished_before_an_error_ends_the_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite at step 3 while step 2 is being written: step 2 is good, and there."""
    raised, original = threading.Event(), saving.save_training

    def late(*args: Any) -> Path:
        assert raised.wait(PATIENCE)
        return original(*args)

    def refuse(guard: Guard, step: int, *numbers: Any) -> None:
        if step == 3:
            raised.set()
            raise UserError("the loss is nan")

    monkeypatch.setattr(saving, "save_training", late)
    monkeypatch.setattr(Guard, "check", refuse)
    with pytest.raises(UserError, match="the loss is nan"):
        train(tiny(text), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [2]


def test_too_little_memory_for_the_copy_is_refused_before_the_first_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "free_memory", lambda: 1000.0)
    with pytest.raises(UserError, match=r"checkpoint.asynchronous copies 0.0 GiB .* with --no-checkpoint.asynchronous"):
        train(tiny(text), tmp_path / "run")
    train(tiny(text, checkpoint__asynchronous=False), tmp_path / "run")


def test_every_so_many_steps_one_is_kept_for_good(text: Path, tmp_path: Path) -> None:
    keys = {"checkpoint__every": 2, "checkpoint__keep": 1, "checkpoint__keep_every": 3, "train__steps": 11, "train__eval_every": 0}
    train(tiny(text, **keys), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [3, 6, 9, 11]


def test_what_a_killed_process_has_not_removed_goes_later(text: Path, tmp_path: Path) -> None:
    """Also of a run that is complete, and makes no further checkpoint."""
    train(tiny(text, checkpoint__keep=0), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [2, 4, 6]
    train(tiny(text, checkpoint__keep=1), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == [6]


def test_memory_is_gone_on_from_when_it_is_newer_and_removed_at_an_orderly_end(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"checkpoint__every": 3, "checkpoint__memory_every": 1, "train__eval_every": 0, "checkpoint__asynchronous": False}
    train(tiny(text, **keys), tmp_path / "whole")
    assert os.listdir(tmp_path / "shm") == []
    cut_off(monkeypatch, tiny(text, **keys), tmp_path / "run", 6)
    (folder,) = (tmp_path / "shm").iterdir()
    assert (steps_on_disk(folder), steps_on_disk(tmp_path / "run")) == ([5], [3])
    train(tiny(text, **keys), tmp_path / "run")
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [5]
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert os.listdir(tmp_path / "shm") == []


def test_damaged_memory_is_named_and_the_disk_is_used(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"checkpoint__every": 3, "checkpoint__memory_every": 1, "checkpoint__asynchronous": False}
    cut_off(monkeypatch, tiny(text, **keys), tmp_path / "run", 6)
    (path,) = (tmp_path / "shm").glob("*/checkpoints/*/rank-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    Trainer(tiny(text, **keys), tmp_path / "run", device="cpu").train()
    assert f"skipped a damaged checkpoint: {path}" in capsys.readouterr().out
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [3]


def test_copies_are_gone_on_from_when_the_run_is_lost(text: Path, tmp_path: Path) -> None:
    """Its folder too: the same command begins where the copy stands; another config is refused all the same."""
    keys = {"checkpoint__copy_to": tmp_path / "copies", "optim__schedule": "constant"}
    keys = {name: str(value) for name, value in keys.items()}
    train(tiny(text, **keys), tmp_path / "run")
    before = state(tmp_path / "run")
    assert [(event["step"], "error" in event) for event in events(tmp_path / "run", "copy")][-1] == (6, False)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"optim.lr"):
        train(tiny(text, optim__lr=0.5, **keys), tmp_path / "run")
    train(tiny(text, train__steps=8, **keys), tmp_path / "run")
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [6]
    assert before.keys() == state(tmp_path / "run").keys()


def test_a_copy_that_fails_is_told_and_training_goes_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise UserError("checkpoint.copy_to = x: the cloud is away")

    monkeypatch.setattr("teratron.checkpoint.copies.Copies.copy", refuse)
    result = Trainer(tiny(text, checkpoint__copy_to=str(tmp_path / "copies")), tmp_path / "run", device="cpu").train()
    assert result.step == 6
    assert "step 6: checkpoint.copy_to = x: the cloud is away" in capsys.readouterr().out
    assert all("cloud" in event["error"] for event in events(tmp_path / "run", "copy"))


def test_a_run_that_has_saved_and_has_no_checkpoint_is_not_begun_again(text: Path, tmp_path: Path) -> None:
    train(tiny(text), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"metrics.jsonl says that step 6 was saved, but .* holds no checkpoint: put it back, set"):
        train(tiny(text), tmp_path / "run")


def test_a_run_that_never_saved_is_begun_again(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"checkpoint__every": 0, "checkpoint__memory_every": 1, "checkpoint__asynchronous": False}
    cut_off(monkeypatch, tiny(text, **keys), tmp_path / "run", 3)
    shutil.rmtree(next((tmp_path / "shm").iterdir()))  # the machine was rebooted
    train(tiny(text, **keys), tmp_path / "run")
    assert events(tmp_path / "run", "resume") == []


def test_other_data_under_the_same_name_are_refused(text: Path, tmp_path: Path) -> None:
    """The prepared text was removed and is made again from a text that has changed."""
    train(tiny(text, train__steps=4, optim__schedule="constant"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data")
    longer = tiny(text, train__steps=6, optim__schedule="constant")
    write_text(text, seed=5)
    with pytest.raises(
        UserError, match=r"data.text: changed since .*step-00000004 was made: found [\d,]+ tokens .* expected [\d,]+ tokens"
    ):
        train(longer, tmp_path / "run")
    write_text(text)
    shutil.rmtree(tmp_path / "run" / "data")
    train(longer, tmp_path / "run")


def test_a_branch_may_learn_from_other_data(text: Path, tmp_path: Path) -> None:
    train(tiny(text), tmp_path / "old")
    other = tiny(write_text(tmp_path / "other.txt", seed=5), train__steps=8)
    for _ in range(2):  # begun, and gone on with before its first own checkpoint
        Trainer(other, tmp_path / "old", fork_to=tmp_path / "new", device="cpu", echo=False)._close()
    train(other, tmp_path / "old", fork_to=tmp_path / "new")


@pytest.mark.parametrize("stall", [1e-3, 0.2, 30.0])
@pytest.mark.parametrize("failures", [0.1, 8.0])
def test_the_automatic_interval_loses_the_least_time(stall: float, failures: float) -> None:
    """Of all intervals: a stall an interval, and half an interval at each failure."""
    step_seconds = 0.5

    def lost(steps: int) -> float:
        return stall / (steps * step_seconds) + failures / 86400 * steps * step_seconds / 2

    best = best_interval(stall, 0.0, step_seconds, failures)
    assert lost(best) <= min(lost(max(1, best - 1)), lost(best + 1), lost(2 * best), lost(max(1, best // 2)))


def test_no_automatic_save_begins_before_the_former_is_written() -> None:
    assert best_interval(stall=1e-6, seconds=50.0, step_seconds=1.0, failures_per_day=1000.0) == 50
    assert best_interval(stall=1e-9, seconds=0.0, step_seconds=1.0, failures_per_day=1000.0) == 1


def test_the_automatic_interval_is_learnt_from_the_first_save() -> None:
    said: list[str] = []
    interval = Interval(CheckpointConfig(every="auto", failures_per_day=1), said.append)
    assert [step for step in range(101, 101 + FIRST) if interval.due(step)] == [100 + FIRST]
    save = Save(Place.DISK, saving.TrainingState(100 + FIRST), begun=interval._since + FIRST * 2.0, stall=0.1, seconds=1.0)
    interval.learn(save)
    expected = round(math.sqrt(2 * 0.1 * 86400) / 2.0)
    assert interval.every == expected
    assert len(said) == 1
    assert f"every {expected} steps from now on" in said[0]
    assert [step for step in range(111, 111 + expected) if interval.due(step)] == [110 + expected]


def test_a_run_with_automatic_saves_saves(text: Path, tmp_path: Path) -> None:
    train(tiny(text, checkpoint__every="auto", checkpoint__keep=0, train__steps=FIRST + 3, train__eval_every=0), tmp_path / "run")
    assert [event["step"] for event in events(tmp_path / "run", "save")][:1] == [FIRST]
    assert json.loads((tmp_path / "run" / "checkpoints" / f"step-{FIRST:08d}" / "manifest.json").read_text())["state"]["step"] == FIRST


@pytest.fixture
def background() -> Iterator[Background]:
    yield (work := Background())
    work.join()


def test_work_beside_is_done_one_by_one_and_errors_come_once(background: Background) -> None:
    go, done = threading.Event(), []

    def first() -> None:
        assert go.wait(PATIENCE)
        done.append("first")
        raise UserError("of the first")

    background.start(first, "first")
    assert (background.busy, background.failed) == (True, False)
    go.set()
    with pytest.raises(UserError, match="of the first"):
        background.start(lambda: done.append("never"), "second")
    assert done == ["first"]
    background.start(lambda: done.append("third"), "third")
    background.join()
    assert done == ["first", "third"]
