"""The demo on a small library: all of it in one call, on again after an interruption, and nothing twice."""

from __future__ import annotations

import os
import random
import shlex
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_state, events, losses

from teratron.cli.main import main
from teratron.config import Config, UserError
from teratron.tasks import demo
from teratron.train import trainer
from teratron.train.commands import program
from teratron.train.engine import Engine

TINY = {
    "model.layers": 1,
    "model.hidden": 16,
    "model.heads": 2,
    "model.ffn": 32,
    "model.seq_length": 16,
    "model.max_positions": 128,
    "train.global_batch": 4,
    "train.eval_batches": 2,
    "optim.lr": 1e-2,
    "log.tensorboard": False,
}
STEPS = 60


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of a hundred small files instead of the real one, and a model and a machine to match."""
    root = tmp_path / "library"
    draw = random.Random(0)
    for number in range(101):
        folder = root / ("tools" if number % 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        names = draw.choices(["count", "name", "path", "value", "items", "key"], k=30)
        lines = [f"def get_{a}(self, {b}):\n    return self.{b}[{a}]\n" for a, b in pairwise(names)]
        (folder / f"module{number}.py").write_text("\n".join(lines), "utf-8")
    for skipped in ("test/test_a.py", "site-packages/b.py", "notes.txt"):
        (root / skipped).parent.mkdir(exist_ok=True)
        (root / skipped).write_text("x = 1\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "empty.py").write_text("\n")
    (root / "LICENSE.txt").write_text("To be, or not to be: that is the question.\n" * 300)
    for name, value in {"library_root": lambda: root, "SMALL": TINY, "VOCAB_SIZE": 300, "HELD_OUT_SHARE": 0.2}.items():
        monkeypatch.setattr(demo, name, value)
    for module in (demo, trainer):
        monkeypatch.setattr(module, "measure_peak", lambda device, dtype: 1e11)
    return root


def run(folder: Path, *more: str) -> int:
    return main(["demo", "--output", str(folder), "--device", "cpu", *more])


def short(folder: Path) -> int:
    """A new demo of the fewest steps that there are."""
    return run(folder, "--minutes", "1e-6")


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    made = Engine.step

    def stepped(*args: Any, step: int, **kwargs: Any) -> Any:
        if step == number:
            action()
        return made(*args, step=step, **kwargs)

    monkeypatch.setattr(Engine, "step", stepped)


def test_one_command_does_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert short(folder) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [f"[{number}/6]" for number in range(1, 7) if f"[{number}/6] " in out] == [f"[{number}/6]" for number in range(1, 7)]
    for name in (
        "config.toml",
        "metrics.jsonl",
        "report.html",
        f"checkpoints/step-{STEPS:08d}/COMPLETE",
        "data/train.idx",
        "data/valid.idx",
    ):
        assert (folder / name).is_file(), name
    assert list(losses(folder)) == list(range(1, STEPS + 1))
    (baseline,) = events(folder, "baseline")
    assert baseline["name"] == "bigram"
    assert events(folder, "eval")[-1]["step"] == STEPS
    assert [(event["step"], event["prompt"]) for event in events(folder, "sample")] == [(STEPS, prompt) for prompt in demo.PROMPTS]
    assert "than a bigram model" in (folder / "report.html").read_text("utf-8")
    assert f"report: {folder / 'report.html'}" in out


def test_no_file_is_in_both_parts_and_only_the_librarys_own_text_is(library: Path) -> None:
    files = demo.library_files()
    assert sorted(path.name for path in files) == sorted(f"module{number}.py" for number in range(101))
    train, held_out = demo.split_files(files)
    assert set(train) | set(held_out) == set(files)
    assert not set(train) & set(held_out)
    assert 5 < len(held_out) < 50
    assert demo.split_files(files[::-1]) == (train[::-1], held_out[::-1]), "a file's part depends on its name alone"


def test_a_library_without_its_source_is_a_sentence(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in library.rglob("module1*.py"):
        path.unlink()
    assert short(tmp_path / "demo") == 2
    assert "Python files found, expected hundreds" in capsys.readouterr().err


def test_an_interrupted_demo_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    with monkeypatch.context() as patch:
        at_step(patch, 33, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert short(folder) == 130
    assert "stopped at step 33; run the same command again to go on" in capsys.readouterr().out
    assert events(folder, "sample") == []
    tokenizer = (folder / "data" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert run(folder, "--minutes", "5") == 0
    out = capsys.readouterr().out
    assert f"continuing with {STEPS} steps; --minutes counts only for a new folder" in out
    assert "[1/6]" not in out
    assert [event["step"] for event in events(folder, "step")] == list(range(1, STEPS + 1)), "each step once"
    assert len(events(folder, "sample")) == len(demo.PROMPTS)
    assert (folder / "data" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer
    assert short(tmp_path / "plain") == 0
    assert_same_state(folder, tmp_path / "plain")


def test_a_demo_killed_after_training_only_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "generate", killed)
        assert short(folder) == 130
    assert (len(events(folder, "baseline")), len(events(folder, "sample"))) == (1, 0)
    monkeypatch.setattr(Engine, "step", killed)
    assert run(folder) == 0
    assert (len(events(folder, "baseline")), len(events(folder, "sample"))) == (1, len(demo.PROMPTS))


def test_a_finished_demo_shows_its_results_again_and_does_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    assert short(folder) == 0
    first = capsys.readouterr().out
    metrics = (folder / "metrics.jsonl").read_bytes()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("done already")

    for module, name in ((Engine, "step"), (demo, "generate"), (demo, "bigram_loss"), (demo, "prepare")):
        monkeypatch.setattr(module, name, refuse)
    assert run(folder) == 0
    again = capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert f"continuing with {STEPS} steps\n" in again
    assert results(again) == results(first)


def results(out: str) -> list[str]:
    """From the perplexity on, without the line that tells the time."""
    lines = out[out.index("[6/6]") :].splitlines()
    return [line for line in lines if not line.startswith("done in ")]


def test_the_commands_to_try_next_run_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my demo"
    assert short(folder) == 0
    out = capsys.readouterr().out
    lines = out[out.index("try next:") :].splitlines()[1:]
    assert len(lines) == 3
    for line in lines:
        command = line.strip()
        assert command.startswith(program() + " ")
        words = shlex.split(command.removeprefix(program()))
        words = ["5" if word == "500" else word for word in words]  # fewer steps of the character model
        keys = ["--model.layers=1", "--optim.warmup_steps=1", "--train.eval_batches=1"] if "shakespeare-char" in words else []
        assert main([*words, *keys, "--device", "cpu"]) == 0, command
    assert Config.load(folder).train.steps == 2 * STEPS
    assert Config.load(tmp_path / "mine").model.seq_length == 64


@pytest.mark.parametrize("root", [None, "empty"])
def test_a_text_of_ones_own_is_there_on_every_machine(root: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the real library, and in one of which a distribution left the documentation out."""
    monkeypatch.undo()
    real = demo.library_root()
    if root:
        (tmp_path / root).mkdir()
        (tmp_path / root / "argparse.py").symlink_to(real / "argparse.py")
        monkeypatch.setattr(demo, "library_root", lambda: tmp_path / root)
    words = shlex.split(demo.next_commands(Path("runs/demo"), 60)[1])
    text = Path(words[words.index("--data.text") + 1])
    assert text.stat().st_size > 10_000


def test_the_device_is_the_one_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def generate(source: Path, prompts: list[str], **options: Any) -> list[str]:
        asked.append(options["device"])
        return ["text"] * len(prompts)

    monkeypatch.setattr(demo, "generate", generate)
    assert short(tmp_path / "demo") == 0
    assert asked == ["cpu"]


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_impossible_minutes_are_refused(tmp_path: Path, minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "demo", "--minutes", minutes) == 2
    assert "--minutes" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_folder_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.toml").write_text(Config().to_toml())
    with pytest.raises(UserError, match="holds another run"):
        demo.demo(other, device="cpu")
    assert [path.name for path in other.iterdir()] == ["config.toml"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert short(tmp_path / "file" / "demo") == 2
    assert "cannot be written" in capsys.readouterr().err
