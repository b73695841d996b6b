"""What a run tells: the lines of metrics.jsonl, TensorBoard, and the live line on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import events, losses, tiny, write_text

from teratron.config import UserError
from teratron.train import Trainer, metrics
from teratron.train.metrics import Console, Metrics, duration

STEP_KEYS = {"event", "terms", "step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "mfu", "time"}
STEP_KEYS |= {"data", "communication"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What a reader sees: in each line, the last text written from its beginning, over what stood there."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for text in line.split("\r"):
                shown = text + shown[len(text) :]
            lines.append(shown.rstrip())
        return lines


def step(number: int, seconds: float = 2.0, **values: Any) -> dict[str, Any]:
    event = {"step": number, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "seconds": seconds, "tokens_per_second": 1234.5, "mfu": 0.31}
    return event | values


@pytest.fixture
def every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each step falls due to be drawn."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(ticks)))


def test_the_documented_keys_are_there(tmp_path: Path) -> None:
    config = tiny(write_text(tmp_path / "text.txt"))
    Trainer(config, tmp_path / "run", device="cpu", echo=False).train()
    steps = events(tmp_path / "run", "step")
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert all(event.keys() == STEP_KEYS for event in steps)
    assert all(math.isfinite(value) for event in steps for key, value in event.items() if key not in ("event", "terms"))
    assert all(event["terms"] == {"next_token": pytest.approx(event["loss"])} for event in steps)
    assert [event["tokens"] for event in steps] == [32 * n for n in range(1, 7)]
    for event in events(tmp_path / "run", "eval"):
        assert event.keys() == {"event", "step", "loss", "perplexity", "terms", "seconds", "time"}
        assert event["perplexity"] == math.exp(event["loss"])
    assert (tmp_path / "run" / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_tensorboard_reads_what_metrics_tell(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny(write_text(tmp_path / "text.txt"), log__tensorboard=True)
    Trainer(config, tmp_path / "run", device="cpu", echo=False).train()
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for tag, kind in (("train/loss", "step"), ("eval/loss", "eval")):
        expected = {event["step"]: event["loss"] for event in events(tmp_path / "run", kind)}
        assert {scalar.step: scalar.value for scalar in board.Scalars(tag)} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_tensorboard_is_said_once_before_the_first_step(
    tmp_path: Path, installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "available", lambda: installed)
    monkeypatch.setattr(metrics, "TensorBoard", Board)
    Trainer(tiny(write_text(tmp_path / "text.txt"), log__tensorboard=True), tmp_path / "run", device="cpu").train()
    lines = capsys.readouterr().out.splitlines()
    said = [number for number, line in enumerate(lines) if "pip install tensorboard" in line]
    first = next(number for number, line in enumerate(lines) if line.startswith("step 1/"))
    assert len(said) == (0 if installed else 1)
    assert all(number < first for number in said)
    assert (tmp_path / "run" / "tensorboard").exists() == installed


class Board:
    """A TensorBoard that only makes its folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()

    def write(self, event: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("tail", ["", '{"event": "step", "st', '{"event": "step", "step": 9, "loss": 1.0}', "\n"])
def test_half_a_line_of_a_killed_process_spoils_no_other(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n' + tail)
    with Metrics(tmp_path, tensorboard=False) as told:
        told.write("step", step=1, loss=0.5)
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ('{"event": "start"}', '{"event": "step", "step": 1, "loss": 0.5}')
    assert path.read_text().endswith("\n")


def test_a_line_is_on_disk_at_once_and_is_strict_json(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as told:
        told.write("step", step=1, loss=math.nan, grad_norm=math.inf, note=None)
        text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse) == {"event": "step", "step": 1, "loss": None, "grad_norm": None, "note": None}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="metrics cannot be written: No space left on device"), Metrics(tmp_path, tensorboard=False) as told:
        told.write("step", step=1)


def test_elsewhere_a_line_stays_for_the_first_every_tenth_and_the_last_step() -> None:
    stream = io.StringIO()
    console = Console(25, 10, stream)
    for number in range(1, 26):
        console.step(step(number))
    console.finish()
    lines = stream.getvalue().splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines] == ["1", "10", "20", "25"]
    assert "\r" not in stream.getvalue()
    for part in ("loss 2.5000", "1,234 tokens/s", "MFU 31%", "left 48 s", "lr 1.00e-03", "norm 1.00"):
        assert part in lines[0]


@pytest.mark.usefixtures("every_draw")
def test_on_a_terminal_one_line_is_redrawn_and_messages_stand_above_it() -> None:
    stream = Terminal()
    console = Console(3, 10, stream)
    console.step(step(1, loss=12345.678))
    console.step(step(2))
    console.say("saved")
    console.step(step(3))
    console.finish()
    saved, live, end = stream.screen()
    assert saved == "saved"
    assert live.startswith("step 3/3  loss 2.5000")
    assert end == ""


@pytest.mark.usefixtures("every_draw")
def test_a_shorter_line_leaves_nothing_of_the_longer_one() -> None:
    stream = Terminal()
    console = Console(9, 10, stream)
    console.step(step(1, loss=1e9))
    console.step(step(2))
    assert stream.screen()[-1].endswith("left 14 s  lr 1.00e-03")


@pytest.mark.usefixtures("every_draw")
@pytest.mark.parametrize(
    ("columns", "end"), [("200", "norm 1.00"), ("80", "lr 1.00e-03"), ("60", "left 16 s"), ("30", "loss 2.5000"), ("9", "step 1/9")]
)
def test_a_narrow_terminal_gets_what_fits(monkeypatch: pytest.MonkeyPatch, columns: str, end: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    Console(9, 10, stream).step(step(1))
    text = stream.getvalue().removeprefix("\r")
    assert len(text) < int(columns)
    assert text.endswith(end)


def test_a_terminal_is_not_redrawn_more_than_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(n * 0.01 for n in range(100, 10**6))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    stream = Terminal()
    console = Console(1000, 10, stream)
    for number in range(1, 1001):
        console.step(step(number))
    assert 90 <= stream.getvalue().count("\r") <= 110
    assert stream.screen()[-1].startswith("step 1000/1000")


def test_the_time_left_forgets_the_first_step() -> None:
    stream = io.StringIO()
    console = Console(101, 1, stream)
    console.step(step(1, seconds=60.0))
    for number in range(2, 12):
        console.step(step(number, seconds=1.0))
    assert "  left 1:30  " in stream.getvalue().splitlines()[-1]


def test_without_a_stream_there_is_silence() -> None:
    console = Console(1, 1, None)
    console.step(step(1))
    console.say("nothing")
    console.finish()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (42.4, "42 s"), (59.7, "1:00"), (187, "3:07"), (3599.6, "1:00:00"), (8100, "2:15:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_that_went_on_counts_its_later_lines(tmp_path: Path) -> None:
    lines = [
        {"event": "step", "step": 1, "loss": 3.0},
        {"event": "step", "step": 2, "loss": 9.0},
        {"event": "step", "step": 2, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert losses(tmp_path) == {1: 3.0, 2: 2.0}
