"""The page of a sweep: its trials as a table, as curves, and as lines over parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from teratron.checkpoint.format import write_synced
from teratron.tasks.sweep_space import Dimension, describe, parse_dimension
from teratron.train import charts
from teratron.train.charts import Series, line_chart, log_ticks, nice_ticks, tick_label
from teratron.train.history import History, number, read_history, step_of
from teratron.train.report_curves import smooth
from teratron.train.report_page import PAGE, STYLE, duration, visible

if TYPE_CHECKING:
    from teratron.tasks.sweep import Sweep

WIDTH, HEIGHT, TOP, SIDE = 1000, 360, 44, 90
OWN_STYLE = """
.parallel .trial { fill: none; stroke: var(--hue-1); stroke-width: 1.6; }
.parallel .best { stroke: var(--hue-2); stroke-width: 3; opacity: 1; }
.parallel .lost { stroke-dasharray: 4 4; opacity: .35; } .parallel .label { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
"""


@dataclass(frozen=True)
class Axis:
    """One coordinate: what stands there, at which share of its height from below."""

    name: str
    ticks: list[tuple[float, str]]
    places: list[float]
    """Of each trial; NaN = none."""


def write_page(sweep: Sweep) -> Path:
    """Write sweep.html anew from what is known of the trials."""
    order = sweep.best_first(range(len(sweep.points)))
    best = sweep.best()
    done = sum(found.state == "done" for found in map(sweep.last, order) if found is not None)
    words = f"{done} of {len(order)} trials came through" + (
        f"; best: trial {best}, {describe(sweep.points[best])}" if best is not None else ""
    )
    name = escape(sweep.folder.resolve().name)
    head = f'<header><p class="state">{escape(sweep.plan.method)}</p><h1>{name}</h1><p>{escape(words)}</p></header>'
    figures = f"<figure>{parallel(axes_of(sweep), order, best)}</figure><figure>{_curves(sweep, best)}</figure>"
    main = f"{head}<section><h2>Trials</h2>{figures}{_table(sweep, order)}</section>"
    page = PAGE.format(title=name, style=STYLE + charts.STYLE + OWN_STYLE, main=main)
    path = sweep.folder / "sweep.html"
    write_synced(path.with_suffix(".partial"), page.encode())
    path.with_suffix(".partial").replace(path)
    return path


def axes_of(sweep: Sweep) -> list[Axis]:
    """The swept keys, how far trials came where that differs, and the metric."""
    trials = range(len(sweep.points))
    dimensions = [parse_dimension(text) for text in sweep.plan.over]
    axes = [_axis(dimension, [point[dimension.key] for point in sweep.points]) for dimension in dimensions]
    found = [sweep.last(trial) for trial in trials]
    steps = [one.step if one else 0 for one in found]
    if sweep.plan.method == "halving":
        names = [str(step) for step in sorted({until for _, until in sweep.rounds})]
        axes.append(_axis(Dimension("steps", tuple(names)), [str(step) for step in steps]))
    values = [one.value if one and one.state == "done" else math.nan for one in found]
    return [*axes, _metric_axis(sweep.plan.metric, values)]


def _axis(dimension: Dimension, texts: Sequence[str]) -> Axis:
    if dimension.values:
        places = {value: (place + 0.5) / len(dimension.values) for place, value in enumerate(dimension.values)}
        return Axis(dimension.key, [(at, value) for value, at in places.items()], [places.get(text, math.nan) for text in texts])
    low, high = dimension.low, dimension.high
    ticks = log_ticks(low, high, 5) if dimension.log else nice_ticks(low, high, 5)

    def place(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if dimension.log else (value - low) / (high - low)

    labels = [
        (place(tick), f"{tick:g}" if dimension.log else tick_label(tick, ticks[1] - ticks[0], max(map(abs, ticks)))) for tick in ticks
    ]
    return Axis(dimension.key, labels, [min(1.0, max(0.0, place(float(text)))) for text in texts])


def _metric_axis(name: str, values: Sequence[float]) -> Axis:
    """Better is higher. What is much worse than the middle is drawn at the lower end, else it would press all others together."""
    known = sorted(value for value in values if math.isfinite(value))
    if not known:
        return Axis(name, [], [math.nan] * len(values))
    best, middle = known[0], known[len(known) // 2]
    worst = min(known[-1], best + 4 * (middle - best)) if middle > best else known[-1]
    span = (worst - best) or abs(best) / 10 or 1.0
    ticks = nice_ticks(best, best + span, 5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else span
    labels = [(1 - (tick - best) / span, tick_label(tick, step, best + span)) for tick in ticks]
    return Axis(name, labels, [max(0.0, 1 - (value - best) / span) for value in values])


def parallel(axes: Sequence[Axis], order: Sequence[int], best: int | None) -> str:
    """An `<svg>` with a line a trial over all axes, stronger the better it is; one without a number is dashed and ends before the last."""
    step = (WIDTH - 2 * SIDE) / max(1, len(axes) - 1)
    places = [SIDE + step * i for i in range(len(axes))]
    lines = [_line(axes, places, trial, 0.9 - 0.7 * rank / max(1, len(order) - 1), trial == best) for rank, trial in enumerate(order)]
    drawn = "".join(
        [*lines[::-1], *(_drawn_axis(axis, x, i == len(axes) - 1) for i, (axis, x) in enumerate(zip(axes, places, strict=True)))]
    )
    return f'<svg class="chart parallel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="trials over their values">{drawn}</svg>'


def _y(share: float) -> float:
    return HEIGHT - 16 - share * (HEIGHT - 16 - TOP)


def _line(axes: Sequence[Axis], places: Sequence[float], trial: int, strength: float, best: bool) -> str:
    points = [(x, _y(axis.places[trial])) for axis, x in zip(axes, places, strict=True) if math.isfinite(axis.places[trial])]
    lost = not math.isfinite(axes[-1].places[trial])
    path = "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = 'class="trial lost"' if lost else 'class="trial best"' if best else f'class="trial" style="opacity:{strength:.2f}"'
    return f'<path {style} d="{path}"><title>trial {trial}</title></path>'


def _drawn_axis(axis: Axis, x: float, last: bool) -> str:
    """The line, its name above, and its labels beside it, those of the last one on the right."""
    label, anchor = (x + 8, "start") if last else (x - 8, "end")
    ticks = (
        f'<text class="label" x="{label:.1f}" y="{_y(at) + 4:.1f}" text-anchor="{anchor}">{escape(text)}</text>' for at, text in axis.ticks
    )
    line = f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_y(0):.1f}" y2="{_y(1):.1f}"/>'
    return f'{line}<text class="title" x="{x:.1f}" y="16" text-anchor="middle">{escape(axis.name)}</text>{"".join(ticks)}'


def _curves(sweep: Sweep, best: int | None) -> str:
    histories = {trial: read_history(sweep.run_of(trial) / "metrics.jsonl") for trial in range(len(sweep.points))}
    held_out = sweep.plan.metric == "valid_loss" and any(len(history.of_kind("eval")) > 2 for history in histories.values())
    found = {trial: _curve(history, held_out) for trial, history in histories.items()}
    others = [Series("", x, y, form="faint") for trial, (x, y) in found.items() if trial != best]
    first = [Series(f"trial {best}, the best", *found[best], hue=2)] if best is not None else []
    title = ("Held-out loss" if held_out else "Training loss") + (f", trial {best} the strong line" if best is not None else "")
    seen = [value for _, y in found.values() for value in y if value > 0]
    log = bool(seen) and max(seen) > 3 * min(seen)
    label = "nats per token" + (", logarithmic" if log else "")
    return line_chart([*others, *first], title=title, x_label="step", y_label=label, log_y=log, width=WIDTH, height=HEIGHT)


def _curve(history: History, held_out: bool) -> tuple[list[float], list[float]]:
    if held_out:
        events = history.of_kind("eval")
        return [step_of(event) for event in events], [number(event.get("loss")) for event in events]
    x, y, _ = smooth(history.columns["step"], history.columns["loss"])
    return x, y


def _table(sweep: Sweep, order: Sequence[int]) -> str:
    keys = list(sweep.points[0])
    names = ["", "trial", *keys, sweep.plan.metric, "steps", "time in steps", ""]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{visible(cell)}</td>' for cell in row)}</tr>" for row in rows_of(sweep, order))
    return f"<table><tr>{head}</tr>{body}</table>"


def rows_of(sweep: Sweep, order: Sequence[int]) -> Iterator[list[str]]:
    """The cells of a table: rank, trial, values, metric, steps, time, what became of it."""
    for rank, trial in enumerate(order, 1):
        found = sweep.last(trial)
        values = list(sweep.points[trial].values())
        if found is None:
            yield ["", str(trial), *values, "", "", "", "waiting"]
            continue
        value = f"{found.value:.4f}" if math.isfinite(found.value) else ""
        state = "" if found.state == "done" else f"{found.state}: {found.reason}"
        yield [str(rank), str(trial), *values, value, str(found.step), duration(found.seconds), state]
