"""The run directory: which keys may change, branching off, damaged checkpoints passed over, one process at a time (contract C13)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_state, events, losses, state, tiny, write_text

from teratron.config import Config, UserError
from teratron.train import Result, Trainer
from teratron.train.run import FORKING, absolute_paths, fork, lock


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def train(config: Config | None, run: Path, **keys: Any) -> Result:
    return Trainer(config, run, device="cpu", echo=False, **keys).train()


@pytest.mark.parametrize(
    "keys",
    [
        {"model__dropout": 0.3},
        {"model__layers": 2},
        {"data__split": "80,20"},
        {"data__text_key": "content"},
        {"optim__lr": 0.5},
        {"train__seed": 9},
        {"train__global_batch": 8},
        {"train__precision": "bf16"},
    ],
)
def test_what_decides_the_numbers_may_not_change(text: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    train(tiny(text), tmp_path / "run")
    name = next(iter(keys)).replace("__", ".")
    before = dict(tiny(text).items())[name]
    with pytest.raises(UserError) as error:
        train(tiny(text, **keys), tmp_path / "run")
    message = str(error.value)
    for part in (name, repr(before), repr(next(iter(keys.values()))), "--fork NEWDIR"):
        assert part in message


def test_everything_else_may_change_and_more_steps_go_on(text: Path, tmp_path: Path) -> None:
    train(tiny(text, optim__schedule="constant"), tmp_path / "run")
    freed = {"log__every": 1, "checkpoint__every": 0, "checkpoint__keep": 0, "train__eval_every": 0, "train__eval_batches": 1}
    result = train(tiny(text, optim__schedule="constant", train__steps=8, train__micro_batch=4, **freed), tmp_path / "run")
    assert (result.step, list(losses(tmp_path / "run"))) == (8, list(range(1, 9)))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [6]
    assert Config.load(tmp_path / "run").train.steps == 8


def test_a_run_that_is_lengthened_is_the_long_run(text: Path, tmp_path: Path) -> None:
    """With a schedule that does not look at the end, 4 steps and then 4 more are 8 steps, bit for bit."""
    for steps in (4, 8):
        train(tiny(text, optim__schedule="constant", train__steps=steps), tmp_path / "parts")
    train(tiny(text, optim__schedule="constant", train__steps=8), tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_finished_run_says_so_and_trains_nothing(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(text), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = Trainer(tiny(text), tmp_path / "run", device="cpu").train()
    assert (result.step, result.interrupted) == (6, False)
    assert "is complete: step 6 of 6; to train on: --train.steps N" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_done_are_refused_and_change_nothing(text: Path, tmp_path: Path) -> None:
    train(tiny(text), tmp_path / "run")
    before = state(tmp_path / "run")
    with pytest.raises(UserError, match=r"train.steps = 3 is below step 6"):
        train(tiny(text, train__steps=3), tmp_path / "run")
    assert Config.load(tmp_path / "run").train.steps == 6
    assert all(torch.equal(tensor, state(tmp_path / "run")[name]) for name, tensor in before.items())


def test_the_folder_alone_is_enough_from_anywhere(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun with relative paths; gone on from another directory, after the raw text has been deleted."""
    monkeypatch.chdir(tmp_path)
    train(tiny("text.txt", train__steps=4), Path("run"))
    train(tiny(text, train__steps=4), Path("same"))  # the absolute path is the same config
    text.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = Config.load(tmp_path / "run").override({"train.steps": 6})
    assert train(moved, Path("../run")).step == 6
    assert train(None, tmp_path / "run").step == 6


def test_the_same_relative_command_goes_on_after_the_text_is_gone(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(tiny("text.txt", train__steps=4), Path("run"))
    text.unlink()
    assert train(tiny("text.txt", train__steps=6), Path("run")).step == 6


def test_paths_become_absolute_and_words_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chars").mkdir()
    here = str(tmp_path)
    blend = Config().override({"data.train": ("0.5", "a", "2", "b/c"), "data.valid": ("d",), "data.tokenizer": "t.json"})
    data = absolute_paths(blend).data
    assert data.train == ("0.5", f"{here}/a", "2", f"{here}/b/c")
    assert (data.valid, data.tokenizer) == ((f"{here}/d",), f"{here}/t.json")
    for word in ("", "chars", "bytes", "bpe", "bpe:300"):
        assert absolute_paths(Config().override({"data.tokenizer": word})).data.tokenizer == word
    assert absolute_paths(absolute_paths(blend)) == absolute_paths(blend)


def test_a_damaged_newest_checkpoint_is_trained_again_to_the_same_numbers(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(text), tmp_path / "whole")
    train(tiny(text), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    Trainer(tiny(text), tmp_path / "run", device="cpu").train()
    assert "skipped a damaged checkpoint" in capsys.readouterr().out
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]
    assert_same_state(tmp_path / "whole", tmp_path / "run")


def test_only_damaged_checkpoints_are_an_error_and_stay(text: Path, tmp_path: Path) -> None:
    train(tiny(text), tmp_path / "run")
    for marker in (tmp_path / "run" / "checkpoints").glob("*/COMPLETE"):
        marker.unlink()
    with pytest.raises(UserError, match=r"no good checkpoint is left \(2 damaged\)"):
        train(tiny(text), tmp_path / "run")
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 2


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("")], ids=["deleted", "emptied"])
def test_a_lost_config_is_that_of_the_newest_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    """Other keys are refused still, and the config is there again."""
    config = tmp_path / "run" / "config.toml"
    train(tiny(text), config.parent)
    damage(config)
    with pytest.raises(UserError, match=r"holds a run with optim\.lr = 0\.01, now 0\.5"):
        train(tiny(text, optim__lr=0.5), config.parent)
    assert Trainer(None, config.parent, device="cpu").train().step == 6
    assert capsys.readouterr().out.count("config.toml is missing or empty: made again from the newest checkpoint") == 1
    assert Config.load(config) == tiny(text).override({"model.vocab_size": Config.load(config).model.vocab_size})


def test_two_processes_in_one_folder_are_refused(text: Path, tmp_path: Path) -> None:
    with lock(tmp_path / "run"), pytest.raises(UserError, match="another process is training here"):
        train(tiny(text), tmp_path / "run")
    train(tiny(text), tmp_path / "run")


def test_a_branch_goes_on_with_other_keys_and_the_old_run_stays(text: Path, tmp_path: Path) -> None:
    train(tiny(text), tmp_path / "old")
    before = state(tmp_path / "old")
    other = tiny(text, optim__lr=1e-3, optim__schedule="constant", train__steps=8)
    assert train(other, tmp_path / "old", fork_to=tmp_path / "new").step == 8
    assert [event["step"] for event in events(tmp_path / "new", "resume")] == [6]
    assert {event["lr"] for event in events(tmp_path / "new", "step")} == {1e-3}
    assert all(torch.equal(tensor, state(tmp_path / "old")[name]) for name, tensor in before.items())
    assert Config.load(tmp_path / "old").optim.lr == 1e-2


def test_the_same_branching_command_goes_on_in_the_branch(text: Path, tmp_path: Path) -> None:
    """Also when the branch has been interrupted before its first own checkpoint, and when the old run has moved on."""
    train(tiny(text), tmp_path / "old")
    branch = tiny(text, optim__lr=1e-3, train__steps=9)
    Trainer(branch, tmp_path / "old", fork_to=tmp_path / "new", device="cpu", echo=False)  # dies before its first step
    train(tiny(text, train__steps=8), tmp_path / "old")
    assert train(branch, tmp_path / "old", fork_to=tmp_path / "new").step == 9
    assert [event["step"] for event in events(tmp_path / "new", "resume")] == [6]
    assert train(branch, tmp_path / "old", fork_to=tmp_path / "new").step == 9
    with pytest.raises(UserError, match=r"optim\.lr = 0\.001, now 0\.5"):
        train(tiny(text, optim__lr=0.5, train__steps=9), tmp_path / "old", fork_to=tmp_path / "new")


def test_a_branch_that_was_refused_can_be_typed_again_rightly(text: Path, tmp_path: Path) -> None:
    train(tiny(text), tmp_path / "old")
    with pytest.raises(UserError, match=r"model\.\* differs"):
        train(tiny(text, model__layers=2), tmp_path / "old", fork_to=tmp_path / "new")
    assert train(tiny(text, train__steps=7), tmp_path / "old", fork_to=tmp_path / "new").step == 7


def test_a_branch_cut_short_while_copying_is_made_again(text: Path, tmp_path: Path) -> None:
    train(tiny(text), tmp_path / "old")
    (tmp_path / "new" / "checkpoints" / "step-00000006").mkdir(parents=True)
    (tmp_path / "new" / FORKING).touch()
    assert train(tiny(text, train__steps=7), tmp_path / "old", fork_to=tmp_path / "new").step == 7
    assert not (tmp_path / "new" / FORKING).exists()


def test_a_branch_keeps_the_tokenizer_of_its_weights(text: Path, tmp_path: Path) -> None:
    """Other text may be learned from, in the old alphabet only."""
    train(tiny(text), tmp_path / "old")
    (tmp_path / "cat.txt").write_text("cat sat on a mat " * 40)
    other = tiny(tmp_path / "cat.txt", train__steps=8)
    assert train(other, tmp_path / "old", fork_to=tmp_path / "new").step == 8
    alphabet = [(tmp_path / run / "tokenizer" / "chars.json").read_text() for run in ("old", "new")]
    assert alphabet[0] == alphabet[1]
    with pytest.raises(UserError, match="is another tokenizer than the one that"):
        train(tiny(tmp_path / "cat.txt", data__tokenizer="bytes"), tmp_path / "old", fork_to=tmp_path / "bytes")


@pytest.mark.parametrize(("old", "new", "message"), [("none", "new", "has no checkpoint to branch off"), ("old", "old2", "something else")])
def test_branches_that_cannot_be_are_refused(text: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    train(tiny(text), tmp_path / "old")
    (tmp_path / "old2" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        train(tiny(text), tmp_path / old, fork_to=tmp_path / new)


def test_an_old_run_that_vanishes_while_it_is_copied_is_a_sentence(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(text), tmp_path / "old")
    (tmp_path / "new").mkdir()

    def vanished(*arguments: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("shutil.copytree", vanished)
    with pytest.raises(UserError, match="No such file or directory; run the same command again"):
        fork(tmp_path / "old", tmp_path / "new")
