"""A run on one page of the terminal, made of nothing but its files, so also from another machine that sees the folder."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from teratron.config import UserError
from teratron.train.history import BEGINNINGS, Event, Follower, History, number, read_config, slow_ranks, step_of
from teratron.train.report_page import compact, details, duration

EVENTS = 8
BLOCKS = "▁▂▃▄▅▆▇█"
SILENCE = 60.0
"""Seconds without an event, and with ten steps' time over, after which a run is called silent."""


@dataclass(frozen=True)
class State:
    """How a run is doing: a word, what it means, and whether more is to come without anybody doing anything."""

    word: str
    meaning: str = ""
    live: bool = True


@dataclass(frozen=True)
class Holder:
    """Who last held a run's lock."""

    host: str = ""
    """The machine; "" = nobody has."""
    alive: bool | None = None
    """Whether that process lives; None = only the other machine knows."""
    since: float = 0.0
    """When it took the lock, in seconds since the epoch."""


class Watcher:
    """Follows a run directory. Raises `UserError` where there is no run."""

    def __init__(self, run: Path) -> None:
        if not (run / "config.toml").is_file() and not (run / "metrics.jsonl").is_file():
            raise UserError(f"{run}: found neither config.toml nor metrics.jsonl; give the folder of a run (the --run of `teratron train`)")
        self.run = run
        self._follower = Follower(run / "metrics.jsonl")

    def state(self, now: float) -> State:
        """now: seconds since the epoch."""
        history = self._follower.update()
        return state_of(history, holder(self.run), now)

    def page(self, now: float) -> RenderableType:
        """What is known by now."""
        state, history, config = self.state(now), self._follower.history, read_config(self.run / "config.toml")
        goal = number(config.get("train.steps"))
        title = Text.assemble((self.run.resolve().name, "bold"), "  ", (state.word, _colour(state)), f"  {state.meaning}")
        rows = Table.grid(padding=(0, 2))
        for name, value in _rows(history, goal):
            rows.add_row(Text(name, "dim"), value)
        return Group(title, rows, *_last_events(history, now))


def state_of(history: History, held: Holder, now: float) -> State:
    """How a run is doing at a moment."""
    last = history.events[-1] if history.events else {}
    again = held.alive is not False and held.since > history.clock
    if last.get("event") == "end" and not again:
        reasons = {"done": State("finished", live=False), "preempted": State("preempted", "it waits to be started again", live=False)}
        return reasons.get(str(last.get("reason")), State("stopped", "the same command goes on with it", live=False))
    if held.alive is False:
        return State("broken", "its process ended without a word; the same command goes on from the newest checkpoint", live=False)
    if not history.events and not history.columns["step"] and not held.host:
        return State("not begun", "no event yet", live=False)
    where = f"on {held.host}" if held.host else ""
    silent = now - max(history.clock if math.isfinite(history.clock) else 0.0, held.since)
    steps = history.median("seconds")
    if silent > max(SILENCE, 10 * steps if math.isfinite(steps) else 0.0):
        what = "it hangs, or does something long" if held.alive else "it hangs, or its process ended without a word"
        return State("silent", f"{where} for {duration(silent)}: {what}")
    return State("starting" if again or not history.events else "running", where)


def holder(run: Path) -> Holder:
    """Who last held the lock of a run."""
    lock = run / ".lock"
    try:
        host, process = lock.read_text("utf-8").split()
        since = lock.stat().st_mtime
    except (OSError, ValueError):
        return Holder()
    if host != socket.gethostname():
        return Holder(host, None, since)
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return Holder(host, False, since)
    except PermissionError:
        pass
    return Holder(host, True, since)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A line of blocks, each the mean of an equal share of the values; higher is more, a space is a gap."""
    count = min(width, len(values))
    shares = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    known = [[value for value in share if math.isfinite(value)] for share in shares]
    means = [sum(share) / len(share) if share else math.nan for share in known]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


def _colour(state: State) -> str:
    return {"running": "green", "finished": "green", "starting": "green", "broken": "bold red", "silent": "bold red"}.get(
        state.word, "yellow"
    )


def _rows(history: History, goal: float) -> Iterator[tuple[str, RenderableType]]:
    step = history.last("step")
    if not math.isfinite(step):
        return
    yield "step", Text(_progress(history, step, goal))
    if goal > 0:
        yield "", ProgressBar(total=goal, completed=step, width=60)
    yield "loss", Text(_losses(history))
    yield "", Text(sparkline(history.columns["loss"]))
    yield "speed", Text(_speed(history))
    if history.ranks:
        yield "memory", Text(_memory(history.ranks))
        yield "ranks", Text(_ranks(history))
    if math.isfinite(history.goodput):
        yield "goodput", Text(f"{history.goodput:.1%} of {duration(history.elapsed)}")


def _progress(history: History, step: float, goal: float) -> str:
    if not goal > 0:
        return f"{step:,.0f}"
    left = (goal - step) * _recent(history, "seconds") / (history.goodput if history.goodput > 0 else 1.0)
    return f"{step:,.0f} of {goal:,.0f} ({step / goal:.1%})" + (f", about {duration(left)} left" if left > 0 else "")


def _losses(history: History) -> str:
    evals = history.of_kind("eval")
    held_out = f", held-out {number(evals[-1].get('loss')):.4f} at step {step_of(evals[-1]):,.0f}" if evals else ""
    return f"{history.last('loss'):.4f}{held_out}"


def _speed(history: History) -> str:
    seconds = _recent(history, "seconds")
    parts = [f"{compact(_recent(history, 'tokens_per_second'))} tokens/s", f"{duration(seconds)} a step"]
    shares = {
        "MFU": _recent(history, "mfu"),
        "data": _recent(history, "data") / seconds,
        "communication": _recent(history, "communication") / seconds,
    }
    parts += [f"{name} {share:.1%}" for name, share in shares.items() if math.isfinite(share)]
    return ", ".join(parts)


def _recent(history: History, name: str) -> float:
    """The mean over the last 20 steps."""
    known = [value for value in history.columns[name][-20:] if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _memory(ranks: Event) -> str:
    memory = ranks.get("memory")
    sizes = {name: number(size) / 2**30 for name, size in memory.items()} if isinstance(memory, dict) else {}
    parts = ", ".join(f"{name} {sizes[name]:.2f}" for name in ("weights", "gradients", "optimizer", "rest") if name in sizes)
    return f"{sizes.get('now', math.nan):.2f} GiB, peak {sizes.get('peak', math.nan):.2f} ({parts})"


def _ranks(history: History) -> str:
    seconds, slow = history.ranks.get("seconds"), slow_ranks(history.ranks)
    named = f"slow: {', '.join(f'rank {rank} ({history.slow[rank]} times)' for rank in slow)}" if slow else "none is slow"
    known = [number(value) for value in seconds] if isinstance(seconds, list) else []
    return f"{len(known)}, own work {duration(min(known))} to {duration(max(known))} a step; {named}" if known else named


def _last_events(history: History, now: float) -> list[RenderableType]:
    lines = Table.grid(padding=(0, 2))
    for event in history.events[-EVENTS:]:
        ago = now - number(event.get("time"))
        short = "" if event["event"] in BEGINNINGS else details(event)[:90]
        lines.add_row(
            Text(f"{duration(ago)} ago" if ago >= 0 else "", "dim"), str(event["event"]), f"step {step_of(event):,.0f}", Text(short, "dim")
        )
    return [Text("\nlast events", "dim"), lines] if history.events else []
