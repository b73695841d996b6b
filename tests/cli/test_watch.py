"""`teratron watch`: the page tells how a run is doing from nothing but its files, whatever state they are in."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny, write_text

from teratron.cli.main import main
from teratron.config import Config
from teratron.tasks.watch import SILENCE, Holder, Watcher, holder, sparkline, state_of
from teratron.train import Trainer
from teratron.train.history import History
from teratron.train.run import lock

NOW = 1_700_000_000.0
START = {"event": "start", "step": 0, "time": NOW - 30}
STEP = {"event": "step", "step": 1, "loss": 2.0, "seconds": 1.0, "tokens_per_second": 1000.0, "mfu": 0.5, "time": NOW - 20}
HERE = Holder("here", True, NOW - 40)
DEAD = Holder("here", False, NOW - 40)
AWAY = Holder("far", None, NOW - 40)


def end(reason: str) -> dict[str, Any]:
    return {"event": "end", "step": 1, "reason": reason, "time": NOW - 10}


@pytest.mark.parametrize(
    ("events", "held", "later", "word", "live"),
    [
        ([], Holder(), 0, "not begun", False),
        ([], HERE, 0, "starting", True),
        ([], DEAD, 0, "broken", False),
        ([START, STEP], HERE, 0, "running", True),
        ([START, STEP], AWAY, 0, "running", True),
        ([START, STEP], Holder(), 0, "running", True),
        ([START, STEP], DEAD, 0, "broken", False),
        ([START, STEP], HERE, SILENCE, "silent", True),
        ([START, STEP], AWAY, SILENCE, "silent", True),
        ([START, STEP | {"seconds": 60.0}], AWAY, SILENCE, "running", True),
        ([START, STEP, end("done")], DEAD, 0, "finished", False),
        ([START, STEP, end("done")], HERE, SILENCE, "finished", False),
        ([START, STEP, end("preempted")], AWAY, SILENCE, "preempted", False),
        ([START, STEP, end("interrupted")], Holder(), 0, "stopped", False),
        ([START, STEP, end("interrupted")], Holder("here", True, NOW - 5), 0, "starting", True),
        ([START, STEP, end("interrupted")], Holder("here", False, NOW - 5), 0, "stopped", False),
    ],
)
def test_the_state_follows_from_the_last_event_and_the_lock(
    events: list[dict[str, Any]], held: Holder, later: float, word: str, live: bool
) -> None:
    history = History()
    for event in events:
        history.add(event)
    state = state_of(history, held, NOW + later)
    assert (state.word, state.live) == (word, live)


def test_the_lock_tells_who_trains(tmp_path: Path) -> None:
    assert holder(tmp_path) == Holder()
    with lock(tmp_path):
        held = holder(tmp_path)
        assert (held.host, held.alive) == (socket.gethostname(), True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / ".lock").write_text(f"{socket.gethostname()} {gone.pid}\n")
    assert holder(tmp_path).alive is False
    (tmp_path / ".lock").write_text(f"another-machine {os.getpid()}\n")
    assert (holder(tmp_path).host, holder(tmp_path).alive) == ("another-machine", None)
    (tmp_path / ".lock").write_text("")
    assert holder(tmp_path) == Holder()


def test_a_page_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = tiny(write_text(tmp_path / "text.txt"), log__every=2)
    Trainer(config, tmp_path / "run", device="cpu", echo=False).train()
    assert main(["watch", str(tmp_path / "run"), "--once"]) == 0
    page = capsys.readouterr().out
    for part in (
        "run  finished",
        "6 of 6 (100.0%)",
        "held-out",
        "tokens/s",
        "GiB, peak",
        "1, own work",
        "none is slow",
        "goodput",
        "save",
        "end",
    ):
        assert part in page, part
    assert main(["watch", str(tmp_path / "run")]) == 0, "what has ended is not waited for"


def test_stragglers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {"event": "ranks", "step": 1, "seconds": [1.0, 2.5], "stragglers": [{"rank": 1, "times": 2.5}], "time": NOW}
    write_run(tmp_path, [START, STEP, ranks])
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "slow: rank 1 (1 times)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tail", ["", "garbage\n", '{"event": "st', '{"event": "ranks", "seconds": "x", "memory": 3}\n', '{"event": "eval", "loss": null}\n']
)
def test_damaged_lines_do_not_stop_the_page(tmp_path: Path, tail: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, [START, STEP], tail)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "2.0000" in capsys.readouterr().out


def test_a_run_that_has_not_begun_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text(Config().to_toml())
    assert main(["watch", str(tmp_path)]) == 0
    assert "not begun" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert "neither config.toml nor metrics.jsonl" in capsys.readouterr().err


def test_watching_writes_nothing_and_sees_what_is_added(tmp_path: Path) -> None:
    write_run(tmp_path, [START, STEP])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    watcher = Watcher(tmp_path)
    watcher.page(NOW)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(end("done")) + "\n")
    assert watcher.state(NOW).word == "finished"


def test_a_sparkline_shows_levels_means_and_gaps() -> None:
    assert sparkline([1.0, 2.0, 3.0, math.nan, 8.0]) == "▁▂▃ █"
    assert sparkline([5.0] * 1000, 10) == "▁" * 10
    assert sparkline([0.0, 2.0] * 30 + [8.0] * 60, 2) == "▁█"
    assert sparkline([]) == ""


def write_run(folder: Path, events: list[dict[str, Any]], tail: str = "") -> None:
    (folder / "config.toml").write_text(Config().to_toml(), "utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail, "utf-8")
