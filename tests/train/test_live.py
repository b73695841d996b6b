"""live.toml: a changed run stays the same however often it is killed; a wrong file is told and changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_state, events, losses, state, tiny, write_text

from teratron.config import OptimConfig, UserError
from teratron.train import Trainer, live
from teratron.train.engine import Engine
from teratron.train.live import changed, in_force, live_lr, not_overridden, read_live, recorded

STEPS = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("live") / "text.txt")


@pytest.fixture(autouse=True)
def _at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PERIOD", 0.0)


def trained(text: Path, run: Path, **keys: Any) -> Trainer:
    settings: dict[str, Any] = {
        "train__steps": STEPS,
        "checkpoint__keep": 0,
        "checkpoint__asynchronous": False,
        "optim__schedule": "constant",
    }
    trainer = Trainer(tiny(text, **settings | keys), run, device="cpu")
    trainer.train()
    return trainer


class Killed(BaseException):
    pass


def within(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something within a step, before its update."""
    passes = Engine.passes

    def acting(engine: Engine, batch: Any, **known: Any) -> Any:
        if known["step"] == step:
            action()
        return passes(engine, batch, **known)

    monkeypatch.setattr(Engine, "passes", acting)


def die() -> None:
    raise Killed


def write(run: Path, content: str) -> None:
    (run / "live.toml").write_text(content)


@pytest.fixture(scope="module")
def changed_run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose learning rate is halved within step 3 and given within step 6."""
    run = tmp_path_factory.mktemp("changed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teratron.train.trainer.measure_peak", lambda device, dtype: 1e11)
        patch.setattr(live, "PERIOD", 0.0)
        within(patch, 3, lambda: write(run, "lr_factor = 0.5\n"))
        within(patch, 6, lambda: write(run, "lr = 0.002\nweight_decay = 0.3\nclip = 0.5\n"))
        trained(text, run)
    return run


def test_changes_hold_from_the_next_step_on_and_are_recorded(changed_run: Path) -> None:
    rates = [event["lr"] for event in events(changed_run, "step")]
    assert rates == [0.01] * 3 + [0.005] * 3 + [0.002] * 2
    told = [{key: value for key, value in event.items() if key not in ("event", "time")} for event in events(changed_run, "live")]
    assert told == [{"step": 4, "lr_factor": 0.5}, {"step": 7, "lr": 0.002, "weight_decay": 0.3, "clip": 0.5}]


def test_decay_and_clipping_are_as_if_the_config_had_said_so(text: Path, tmp_path: Path) -> None:
    """From the first step on, in place of those of the config."""
    run, keys = tmp_path / "run", {"optim__groups": "*.bias: decay=0.2"}
    run.mkdir()
    write(run, "weight_decay = 0.3\nclip = 0.01\n")
    trained(text, run, **keys)
    trained(text, tmp_path / "config", optim__weight_decay=0.3, optim__clip=0.01, **keys)
    assert_same_state(run, tmp_path / "config")


def test_they_change_the_numbers(text: Path, changed_run: Path, tmp_path: Path) -> None:
    """Or the tests below would hold for a file that nobody reads."""
    trained(text, tmp_path / "plain")
    plain, other = losses(tmp_path / "plain"), losses(changed_run)
    assert [plain[step] == other[step] for step in range(1, STEPS + 1)] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("first", [2, 4, 6])
def test_a_run_killed_later_goes_the_same_way_from_any_checkpoint(
    text: Path, changed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Killed in its last step, and gone on with from before, between and after the changes, the file still there."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        within(patch, 3, lambda: write(run, "lr_factor = 0.5\n"))
        within(patch, 6, lambda: write(run, "lr = 0.002\nweight_decay = 0.3\nclip = 0.5\n"))
        within(patch, STEPS, die)
        with pytest.raises(Killed):
            trained(text, run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > first:
            shutil.rmtree(folder)
    trained(text, run)
    assert [event["step"] for event in events(run, "resume")] == [first]
    assert_same_state(changed_run, run)
    assert losses(changed_run) == losses(run)
    assert len(events(run, "live")) == 2, "what is taken up again is not new"


def test_without_the_file_changes_hold_on_and_that_is_said(text: Path, changed_run: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(changed_run, run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    (run / "live.toml").unlink()
    trained(text, run)
    assert losses(changed_run) == losses(run)
    assert "no longer says clip, lr, weight_decay: the last value goes on to hold" in capsys.readouterr().out


def test_a_change_made_while_the_run_was_down_takes_the_place_of_those_ahead(text: Path, changed_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(changed_run, run)
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    write(run, "lr_factor = 0.1\n")
    trained(text, run)
    assert [event["lr"] for event in events(run, "step")][-4:] == pytest.approx([0.001] * 4)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    before = losses(run)
    trained(text, run)
    assert losses(run) == before, "and is what is taken up again"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("lr = = 1", "not a readable TOML file"),
        ("lrr = 1", "unknown key 'lrr' (did you mean 'lr'?)"),
        ("lr = 'fast'", "lr = 'fast': expected number"),
        ("lr = -1", "lr = -1: expected at least 0"),
        ("lr = 1\nlr_factor = 2", "are two learning rates: keep one"),
        ("stop_step = 2.5", "stop_step = 2.5: expected integer"),
        ("[lr]\nvalue = 1", "expected number"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    write(tmp_path, content)
    with pytest.raises(UserError) as refused:
        read_live(tmp_path / "live.toml")
    assert sentence in str(refused.value)
    assert str(tmp_path / "live.toml") in str(refused.value)


def test_a_wrong_file_kills_no_run_and_changes_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        within(patch, 2, lambda: write(run, "lr_factor = 0.5"))
        within(patch, 4, lambda: write(run, "lr_factor = 'x'"))
        trained(text, run)
    assert [event["lr"] for event in events(run, "step")] == [0.01] * 2 + [0.005] * 6
    assert capsys.readouterr().out.count("ignored until the file changes") == 1


def test_it_stops_after_a_step_evaluates_saves_and_goes_on(text: Path, tmp_path: Path, capsys: Any) -> None:
    trained(text, tmp_path / "plain")
    run = tmp_path / "run"
    run.mkdir()
    write(run, "stop_step = 5\n")
    trained(text, run)
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir())[-1] == "step-00000005"
    assert [event["step"] for event in events(run, "eval")] == [3, 5]
    assert [event["reason"] for event in events(run, "end")] == ["stopped"]
    capsys.readouterr()
    trained(text, run)
    assert f"to train on: take stop_step out of {run / 'live.toml'}" in capsys.readouterr().out
    write(run, "")
    trained(text, run)
    assert_same_state(tmp_path / "plain", run)
    assert losses(tmp_path / "plain") == losses(run)


def test_a_step_that_has_passed_stops_at_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    within(monkeypatch, 4, lambda: write(run, "stop_step = 1"))
    trained(text, run)
    assert max(losses(run)) == 4
    assert state(run)


def test_a_branch_keeps_changes_but_of_keys_given_anew() -> None:
    made = ((4, "lr_factor", 0.5), (6, "weight_decay", 0.3))
    assert not_overridden(made, OptimConfig(), OptimConfig()) == made
    assert not_overridden(made, OptimConfig(), OptimConfig(lr=1e-5)) == made[1:]
    assert not_overridden(made, OptimConfig(), OptimConfig(weight_decay=0.0)) == made[:1]


def test_of_two_learning_rates_the_later_holds() -> None:
    made = changed((), [(3, "lr_factor", 0.5), (5, "lr", 1e-4), (8, "lr_factor", 1.0)])
    assert [live_lr(1e-2, made, step) for step in (2, 3, 5, 7, 8)] == [1e-2, 5e-3, 1e-4, 1e-4, 1e-2]
    assert in_force(changed(made, [(4, "lr_factor", 0.25)]), 9) == {"lr_factor": 0.25}, "one before others takes their place"


def test_a_line_cut_short_was_no_change_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    journal.write_text('{"event": "live", "step": 4, "lr": 0.1}\n{"event": "live", "step": 9, "l')
    assert recorded(tmp_path) == [(4, "lr", 0.1)]
    journal.write_text('{"event": "live", "step": null, "lr": 0.1}\n')
    with pytest.raises(UserError, match="line 1, a live change, cannot be read"):
        recorded(tmp_path)
