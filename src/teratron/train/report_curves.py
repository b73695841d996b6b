"""The curves of a report: loss by step and by time with what happened beneath, learning rate, gradient norm, throughput."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import PurePath
from typing import Any

from teratron.train.charts import Lane, Rule, Series, line_chart
from teratron.train.history import BEGINNINGS, Event, History, number, step_of
from teratron.train.report_page import details, duration

LANES = {
    "saves": ("save",),
    "copies": ("copy",),
    "evaluations": ("eval", "task"),
    "stragglers": ("straggler",),
    "bad numbers": ("skip", "bad_numbers", "spike", "corruption"),
    "restarts": ("restart", "resume"),
    "forks": ("fork",),
    "changes": ("live",),
    "traces": ("profile",),
    "stops": ("end",),
}
"""The rows of marks on the time axis, and the kinds of events on each."""
UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
NOISE = ("critical_batch", "batch")
"""What an event of the gradient noise scale says in sequences."""
WARNING = ("stragglers", "bad numbers", "restarts")


def curves(config: dict[str, Any], history: History) -> str:
    """The loss over the page's width (on a phone its narrow twin), learning rate, gradient norm and throughput, then the time axis."""
    if not history.columns["step"] and not history.of_kind("eval"):
        return '<p class="empty">No training steps are recorded yet.</p>\n'
    small = "".join(f"<figure>{chart}</figure>" for chart in _small_charts(config, history))
    over_time = _twins(partial(_time_chart, history)) if history.elapsed > 0 and history.columns["step"] else ""
    return f'<section>{_twins(partial(_loss_chart, history))}<div class="row">{small}</div>{over_time}</section>\n'


def _twins(draw: Any) -> str:
    wide, narrow = (draw(width, height) for width, height in ((1000, 400), (340, 280)))
    return f'<figure class="wide">{wide}</figure><figure class="narrow">{narrow}</figure>'


def _loss_chart(history: History, width: int, height: int) -> str:
    steps, losses = history.columns["step"], history.columns["loss"]
    evals, bigram = history.of_kind("eval"), bigram_of(history)
    held_out = Series("held-out", [step_of(event) for event in evals], [number(event.get("loss")) for event in evals], 2, "dots")
    curves = [*_smoothed("training", steps, losses), *([held_out] if evals else [])]
    rules = [Rule(f"bigram model {number(bigram['loss']):.3f}", number(bigram["loss"]))] if bigram else []
    seen = [loss for loss in losses if loss > 0]
    log = bool(seen) and max(seen) > 3 * min(seen)
    chart = partial(line_chart, curves, title="Loss", x_label="step", x_note=partial(_tooltip, history), rules=rules, log_y=log)
    return chart(y_label="nats per token, logarithmic" if log else "nats per token", width=width, height=height)


def _time_chart(history: History, width: int, height: int) -> str:
    """The loss over the time since the beginning, and on the same axis when it ran and what happened."""
    lanes = [_running(history), *_lanes(history)]
    unit, seconds = next((unit, size) for unit, size in UNITS if history.elapsed >= 2 * size or size == 1)
    moments = [value / seconds for value in history.columns["elapsed"]]
    scaled = [Lane(lane.name, [x / seconds for x in lane.x], lane.tips, [x / seconds for x in lane.until], lane.hue) for lane in lanes]
    loss = _smoothed("training", moments, history.columns["loss"])[-1:]
    chart = partial(line_chart, loss, title="Loss and events over time", y_label="nats per token", lanes=scaled)
    label = f"{unit} since the start, without pauses after an orderly stop" if width > 500 else unit
    return chart(x_label=label, x_note=lambda x: f"{x:.4g} {unit}", width=width, height=height + 60)


def _running(history: History) -> Lane:
    """A bar for each process, from its first to its last event."""
    starts = [event["elapsed"] for event in history.events if event["event"] in BEGINNINGS] or [0.0]
    ends = [_last_before(history, start) for start in starts[1:]] + [history.elapsed]
    return Lane("running", starts, [duration(end - start) for start, end in zip(starts, ends, strict=True)], ends)


def _last_before(history: History, moment: float) -> float:
    """When the process that ran before this moment was heard of last."""
    steps = history.columns["elapsed"]
    place = bisect.bisect_left(steps, moment)
    others = (event["elapsed"] for event in history.events if event["elapsed"] < moment and event["event"] != "restart")
    return max(*others, steps[place - 1] if place else 0.0, 0.0)


def _lanes(history: History) -> Iterator[Lane]:
    marked = history.events[1:]
    if history.events and history.events[0]["event"] == "resume":  # from the checkpoint of another run
        marked = [history.events[0] | {"event": "fork"}, *marked]
    for name, kinds in LANES.items():
        found = [event for event in marked if event["event"] in kinds]
        if found:
            yield Lane(name, [event["elapsed"] for event in found], [_tip(event) for event in found], (), 2 if name in WARNING else 1)


def _tip(event: Event) -> str:
    return f"{event['event']} at step {step_of(event):,.0f}: {details(event)}"


def _small_charts(config: dict[str, Any], history: History) -> list[str]:
    steps, norms = history.columns["step"], history.columns["grad_norm"]
    if not steps:
        return []
    chart = partial(line_chart, x_label="step", width=320, height=210, x_note=partial(_tooltip, history))
    known, clip = [norm for norm in norms if norm > 0], number(config.get("optim.clip"))
    rules = [Rule(f"clipped at {clip:g}", clip)] if clip > 0 and config.get("optim.clip_by", "norm") == "norm" else []
    log = bool(known) and max(known) > 30 * min(known)
    rate, speed = Series("learning rate", steps, history.columns["lr"]), _smoothed("", steps, history.columns["tokens_per_second"])
    charts = [
        chart([rate], title="Learning rate", y_label="", from_zero=True),
        chart(_smoothed("", steps, norms), title="Gradient norm", y_label="", log_y=log, rules=rules),
        chart(speed, title="Throughput", y_label="tokens per second", from_zero=True),
    ]
    noise = history.of_kind("noise")
    if noise:
        measured = [step_of(event) for event in noise]
        scales = [Series(name.replace("_", " "), measured, [number(event.get(name)) for event in noise]) for name in NOISE]
        scales[1] = replace(scales[1], hue=2)
        charts.append(chart(scales, title="Noise scale", y_label="sequences", log_y=True))
    return [*charts, *_task_charts(history, chart)]


def _task_charts(history: History, chart: Callable[..., str]) -> Iterator[str]:
    """One a task and file of `train.eval_tasks`: the first of its metrics."""
    found: dict[tuple[str, str], list[Event]] = {}
    for event in history.of_kind("task"):
        if isinstance(event.get("metrics"), dict) and event["metrics"]:
            found.setdefault((str(event.get("task")), PurePath(str(event.get("file"))).name), []).append(event)
    for (task, file), events in found.items():
        metric = next(iter(events[-1]["metrics"]))
        values = [number(event["metrics"].get(metric)) for event in events]
        curve = Series("", [step_of(event) for event in events], values, 2, "dots")
        yield chart([curve], title=f"{task}, {file}", y_label=metric.replace("_", " "))


def _tooltip(history: History, step: float) -> str:
    place = bisect.bisect_right(history.columns["step"], step) - 1
    tokens = history.columns["tokens"][place] if place >= 0 else math.nan
    return f"step {step:,.0f}" + (f", {tokens:,.0f} tokens" if math.isfinite(tokens) else "")


def _smoothed(name: str, x: Sequence[float], y: Sequence[float]) -> list[Series]:
    """A curve as it is, faint, and its moving mean; short curves as they are."""
    if len(x) < 100:
        return [Series(name or "each step", x, y)] if x else []
    places, means, window = smooth(x, y)
    name = f"{name}, " if name else ""
    return [Series(f"{name}each step", x, y, form="faint"), Series(f"{name}mean of {window:,} steps", places, means)]


def smooth(x: Sequence[float], y: Sequence[float], points: int = 1000) -> tuple[list[float], list[float], int]:
    """Centred moving mean over 2 % of a curve, at `points` places; returns x, y and the steps of a window.

    Near the beginning the window shrinks evenly on both sides, so that a steep fall is not smoothed away.
    """
    reach = len(x) // 100
    sums = list(accumulate((v if math.isfinite(v) else 0.0 for v in y), initial=0.0))
    counts = list(accumulate((math.isfinite(v) for v in y), initial=0))
    places = sorted({round(i * (len(x) - 1) / (points - 1)) for i in range(points)}) if len(x) > points else range(len(x))
    means = []
    for i in places:
        half = min(reach, i)
        start, end = i - half, min(i + half + 1, len(x))
        known = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / known if known and math.isfinite(y[i]) else math.nan)
    return [x[i] for i in places], means, 2 * reach + 1


def bigram_of(history: History) -> Event | None:
    """The bigram baseline of a run that has one."""
    found = [event for event in history.of_kind("baseline") if event.get("name") == "bigram" and math.isfinite(number(event.get("loss")))]
    return found[-1] if found else None
