"""What a run's history tells: time that was useful and time that was not, and the same while the file grows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from teratron.train.history import Follower, History, read_history
from teratron.train.report import write_report


def step(number: int, time: float, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 5 / number, "seconds": 1.0, "time": time} | more


def crashed() -> list[dict[str, Any]]:
    """Ten seconds of steps, of which four run again after a crash that is noticed five seconds later; a save, a pause, two more steps."""
    return [
        {"event": "start", "step": 0, "time": 100.0},
        *(step(n, 100.0 + n) for n in range(1, 7)),
        {"event": "save", "step": 6, "time": 106.5, "stall": 0.5},
        *(step(n, 100.5 + n) for n in range(7, 11)),
        {"event": "resume", "step": 6, "time": 115.5},
        *(step(n, 109.5 + n) for n in range(7, 11)),
        {"event": "end", "step": 10, "reason": "preempted", "time": 119.5},
        {"event": "resume", "step": 10, "time": 1000.0},
        step(11, 1001.0, skipped=True),
        step(12, 1002.0),
        {"event": "end", "step": 12, "reason": "done", "time": 1002.0},
    ]


def history_of(events: list[dict[str, Any]]) -> History:
    history = History()
    for event in events:
        history.add(event)
    return history


def test_goodput_counts_lost_steps_and_crashes_but_no_orderly_pause() -> None:
    history = history_of(crashed())
    assert history.useful == 12
    assert history.lost == 4
    assert history.down == 5
    assert history.wall == pytest.approx(10.5 + 4 + 2)
    assert history.goodput == pytest.approx(12 / 21.5)
    assert history.total("save", "stall") == 0.5


def test_a_run_without_interruption_has_nothing_lost() -> None:
    history = history_of([{"event": "start", "step": 0, "time": 0.0}, *(step(n, float(n)) for n in range(1, 9))])
    assert (history.lost, history.down, history.goodput) == (0, 0, 1)


def test_without_times_there_is_no_goodput() -> None:
    assert math.isnan(history_of([{"event": "step", "step": 1, "seconds": 1.0}]).goodput)


def test_a_skipped_step_is_an_event_and_a_step() -> None:
    history = history_of(crashed())
    assert [event["step"] for event in history.events if event["event"] == "skip"] == [11]
    assert list(history.columns["step"]) == list(range(1, 13))


def test_reports_of_ranks_are_counted_and_do_not_fill_the_events() -> None:
    named = [{"event": "ranks", "step": n, "stragglers": [{"rank": 1, "times": 2.0}] if n % 2 else []} for n in range(9)]
    history = history_of(named)
    assert (history.events, history.slow, history.ranks["step"]) == ([], {1: 4}, 8)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_following_a_growing_file_is_reading_it_at_once(tmp_path: Path, size: int) -> None:
    """Also where it is read in the middle of a line."""
    whole = "".join(json.dumps(event) + "\n" for event in crashed()).encode()
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    for start in range(0, len(whole), size):
        with path.open("ab") as file:
            file.write(whole[start : start + size])
        follower.update()
    once = read_history(path)
    assert repr(follower.history) == repr(once)
    assert once.unreadable == 0


def test_the_report_marks_what_happened_on_the_time_axis(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in crashed()))
    page = write_report(tmp_path).read_text("utf-8")
    assert "Goodput" in page
    assert "lost steps 18.6 %, down 23.3 %, saving 2.3 %" in page
    for lane, tip in {"saves": "save at step 6", "bad numbers": "skip at step 11", "restarts": "resume at step 10", "stops": "end"}.items():
        assert f">{lane}</text>" in page
        assert tip in page
    assert ">forks</text>" not in page


def test_a_run_that_begins_with_a_resume_was_branched_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in crashed()[9:]))
    assert ">forks</text>" in write_report(tmp_path).read_text("utf-8")
