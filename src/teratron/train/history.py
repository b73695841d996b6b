"""A run's history: what metrics.jsonl tells, less the steps and events that a restart took back; and its config.toml as it stands."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teratron.config import UserError

Event = dict[str, Any]
COLUMNS = ("step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "mfu", "data", "communication", "elapsed")
BEGINNINGS = ("start", "resume")


@dataclass
class History:
    """What metrics.jsonl tells: the steps as columns of float64 (NaN = missing), every other event as it came.

    Of a step that ran twice, because a run was interrupted after its last checkpoint, the later line counts.
    """

    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    events: list[Event] = field(default_factory=list)
    """All but steps and `ranks`, with their `elapsed`; a step whose update was skipped is there as `skip`."""
    start: Event = field(default_factory=dict)
    """What the last process to begin told about itself; its time is the first one's."""
    ranks: Event = field(default_factory=dict)
    """The last event of that kind."""
    slow: dict[int, int] = field(default_factory=dict)
    """By rank: how many `ranks` events named it as a straggler."""
    unreadable: int = 0
    wall: float = 0.0
    """Seconds between the first and the last event of each process, together."""
    down: float = 0.0
    """Seconds from the last event of a process that ended without a word to the first of the next."""
    lost: float = 0.0
    """Seconds of steps that ran again after a restart."""
    clock: float = math.nan
    """Time of the last event, in seconds since the epoch."""
    _ended: bool = False

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning, less the pauses after an orderly end."""
        return self.wall + self.down

    @property
    def useful(self) -> float:
        """Seconds of the steps that count."""
        return math.fsum(value for value in self.columns["seconds"] if math.isfinite(value))

    @property
    def goodput(self) -> float:
        """The share of the elapsed time that went into steps that count; NaN without times."""
        return min(1.0, self.useful / self.elapsed) if self.elapsed > 0 else math.nan

    def add(self, event: Event) -> None:
        kind, step = event.get("event"), number(event.get("step"))
        self._pass_time(kind, number(event.get("time")))
        if kind == "step" and math.isfinite(step):
            self._forget(step)
            for name, column in self.columns.items():
                column.append(self.elapsed if name == "elapsed" else number(event.get(name)))
        elif kind in BEGINNINGS:
            self._forget(step + 1)
            self.start = event | {"time": self.start.get("time", event.get("time"))}
        if kind == "ranks":
            self.ranks = event
            for straggler in slow_ranks(event):
                self.slow[straggler] = self.slow.get(straggler, 0) + 1
        elif isinstance(kind, str) and (kind != "step" or event.get("skipped")):
            self.events.append(event | {"event": "skip" if kind == "step" else kind, "elapsed": self.elapsed})

    def _pass_time(self, kind: Any, time: float) -> None:
        gap = time - self.clock
        if math.isfinite(gap) and kind in (*BEGINNINGS, "restart"):
            self.down += 0.0 if self._ended else max(gap, 0.0)
        elif math.isfinite(gap):
            self.wall += gap
        self.clock = time if math.isfinite(time) else self.clock
        self._ended = kind == "end" or (self._ended and kind not in ("step", *BEGINNINGS))

    def _forget(self, step: float) -> None:
        while self.columns["step"] and self.columns["step"][-1] >= step:
            self.lost += max(0.0, self.columns["seconds"][-1]) if math.isfinite(self.columns["seconds"][-1]) else 0.0
            for column in self.columns.values():
                column.pop()

    def of_kind(self, kind: str) -> list[Event]:
        """Events of a kind by step, less those after the checkpoint that a run resumed from; the later of two alike."""
        kept: dict[tuple[Any, ...], Event] = {}
        for event in self.events:
            if event["event"] in BEGINNINGS:
                kept = {key: old for key, old in kept.items() if not number(old.get("step")) > number(event.get("step"))}
            elif event["event"] == kind:
                kept[tuple(str(event.get(name)) for name in ("step", "name", "prompt", "text", "task", "file"))] = event
        return sorted(kept.values(), key=step_of)

    def last(self, name: str) -> float:
        return self.columns[name][-1] if self.columns[name] else math.nan

    def median(self, name: str) -> float:
        known = [value for value in self.columns[name] if math.isfinite(value)]
        return statistics.median(known) if known else math.nan

    def total(self, kind: str, name: str) -> float:
        """The sum of a number over all events of a kind, those that were taken back among them."""
        values = (number(event.get(name)) for event in self.events if event["event"] == kind)
        return math.fsum(value for value in values if math.isfinite(value))


class Follower:
    """Reads metrics.jsonl while it grows; lines that are no JSON object, such as one cut by a crash, are counted and left out."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.history = History()

    def update(self) -> History:
        """The history with all whole lines that are there now; the last one need not be ended."""
        if not self._path.is_file():
            return self.history
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n") and not _is_json(line):
                    break  # the rest is still being written
                self._read += len(line)
                if line.strip():
                    self._add(line)
        return self.history

    def finish(self) -> History:
        """The same when nobody writes any more: half a line counts as unreadable."""
        history = self.update()
        if self._path.is_file() and self._path.stat().st_size > self._read:
            history.unreadable += 1
        return history

    def _add(self, line: bytes) -> None:
        try:
            self.history.add(dict(json.loads(line)))
        except (ValueError, TypeError):
            self.history.unreadable += 1


def read_history(path: Path) -> History:
    """All of metrics.jsonl; without the file an empty history."""
    return Follower(path).finish()


def read_config(path: Path) -> dict[str, Any]:
    """config.toml as `section.key` -> value, also of another version whose keys this one does not know; {} without a file."""
    if not path.is_file():
        return {}
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}; restore it from a checkpoint of the run") from None
    return {f"{section}.{key}": value for section, table in tree.items() if isinstance(table, dict) for key, value in table.items()}


def number(value: Any) -> float:
    """A float, NaN for everything that is no usable number."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e290 else math.nan


def step_of(event: Event) -> float:
    """An event's step, 0 for one without."""
    step = number(event.get("step"))
    return step if math.isfinite(step) else 0.0


def perplexity_of(event: Event) -> float:
    """What an `eval` or `baseline` event says, or what follows from its loss."""
    given, loss = number(event.get("perplexity")), number(event.get("loss"))
    return given if math.isfinite(given) else math.exp(min(loss, 600.0))


def slow_ranks(event: Event) -> list[int]:
    """The stragglers that a `ranks` event names."""
    found = event.get("stragglers")
    return [entry["rank"] for entry in found if isinstance(entry, dict) and "rank" in entry] if isinstance(found, list) else []


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
