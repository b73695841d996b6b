"""A report's map of the parts of a model: how much each has moved, relative to its size, at every measurement (`log.norms`)."""

from __future__ import annotations

import math
from html import escape

from teratron.train.history import Event, History, number, step_of

COLUMNS, CELL, LINE = 40, 14, 12
"""Measurements shown, and the width and height of one in pixels."""
LABEL = 260


def norm_map(history: History) -> str:
    """Rows are parts, columns steps; nothing for a run without measurements."""
    events = [event for event in history.of_kind("norms") if isinstance(event.get("parts"), dict)]
    if not events:
        return ""
    last = len(events) - 1
    shown = [events[place] for place in sorted({last * column // (COLUMNS - 1) for column in range(COLUMNS)})]
    parts = list(events[-1]["parts"])
    updates = [value for event in shown for part in parts if (value := _numbers(event, part)[2]) > 0]
    low, high = (math.log10(min(updates)), math.log10(max(updates))) if updates else (0.0, 1.0)
    cells = "".join(_cell(row, column, event, part, low, high) for row, part in enumerate(parts) for column, event in enumerate(shown))
    labels = "".join(
        f'<text x="{LABEL - 6}" y="{row * LINE + 10}" text-anchor="end">{escape(part)}</text>' for row, part in enumerate(parts)
    )
    width, height = LABEL + CELL * len(shown), LINE * len(parts)
    picture = f'<svg class="chart" style="max-width:{width}px;font-size:10px" viewBox="0 0 {width} {height}">{labels}{cells}</svg>'
    first, final = (f"{step_of(event):,.0f}" for event in (shown[0], shown[-1]))
    caption = f"Relative update of every part from step {first} to {final}: faint is 1e{low:.1f}, full 1e{high:.1f}"
    return f"<section><h2>Parts</h2><details><summary>{caption}</summary><figure>{picture}</figure></details></section>\n"


def _cell(row: int, column: int, event: Event, part: str, low: float, high: float) -> str:
    gradient, weight, update = _numbers(event, part)
    share = (math.log10(update) - low) / (high - low or 1.0) if update > 0 else 0.0
    tip = f"{part}, step {step_of(event):,.0f}: gradient {gradient:.3g}, weights {weight:.3g}, relative update {update:.3g}"
    place = f'x="{LABEL + CELL * column}" y="{LINE * row}" width="{CELL - 1}" height="{LINE - 1}"'
    return f'<rect {place} fill="var(--hue-1)" fill-opacity="{0.08 + 0.92 * share:.2f}"><title>{escape(tip)}</title></rect>'


def _numbers(event: Event, part: str) -> tuple[float, float, float]:
    """NaN where the event does not know."""
    found = event["parts"].get(part)
    values = [number(value) for value in found] if isinstance(found, list) else []
    return (values[0], values[1], values[2]) if len(values) == 3 else (math.nan, math.nan, math.nan)
