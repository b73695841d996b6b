"""Line charts as inline SVG text: round ticks, gaps, legend, tooltips; pure functions, no script, no dependency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

STYLE = """
.chart { --hue-1: #2a64ad; --hue-2: #c2571a; --rule: #6f767c; display: block; width: 100%; height: auto; overflow: visible;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
.chart text { fill: currentColor; font-variant-numeric: tabular-nums; }
.chart .soft { opacity: .65; } .chart .title { font-size: 13px; font-weight: 600; }
.chart .grid { stroke: currentColor; opacity: .11; } .chart .axis { stroke: currentColor; opacity: .38; }
.chart .rule { stroke: var(--rule); stroke-width: 1.3; stroke-dasharray: 5 4; }
.chart path { fill: none; stroke-linejoin: round; } .chart .line { stroke-width: 1.8; }
.chart .faint { stroke-width: 1; opacity: .36; } .chart .dots { stroke-width: 1.3; }
.chart .hue-1 { stroke: var(--hue-1); } .chart .hue-2 { stroke: var(--hue-2); }
.chart circle.hue-1 { fill: var(--hue-1); stroke: none; } .chart circle.hue-2 { fill: var(--hue-2); stroke: none; }
.chart .mark.hue-1 { fill: var(--hue-1); stroke: none; } .chart .mark.hue-2 { fill: var(--hue-2); stroke: none; }
.chart .mark.bar { opacity: .3; }
.chart .tip { fill: currentColor; opacity: 0; } .chart .tip:hover { opacity: .08; }
@media screen and (prefers-color-scheme: dark) { .chart { --hue-1: #74abf2; --hue-2: #f0965a; --rule: #98a1a9; } }
"""
"""CSS of the charts, to be put once on the page that holds them."""

TEXT = 12
CHARACTER = 0.64
"""Width of a character over the font size: above the mean of common sans-serif fonts, so that estimated labels never touch."""
LARGEST, SMALLEST = 1e250, 1e-250
"""Beyond these a number is a gap, or zero: axis arithmetic would overflow."""


@dataclass(frozen=True)
class Series:
    """One curve; None or NaN in `y` is a gap. `form`: a line, a faint line behind another, or a thin line with dots.

    Without a name it stands in no legend and no tooltip."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    hue: Literal[1, 2] = 1
    form: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Rule:
    """A horizontal dashed line at `y`, named in the legend."""

    name: str
    y: float


@dataclass(frozen=True)
class Lane:
    """A row of marks beneath the curves, on their x axis, each with a tooltip; with `until` they are bars that end there."""

    name: str
    x: Sequence[float]
    tips: Sequence[str]
    until: Sequence[float] = ()
    hue: Literal[1, 2] = 1


LANE = 17
"""Height of a lane."""

Points = list[tuple[float, float]]
"""(x, y), y NaN where there is a gap."""


@dataclass(frozen=True)
class _Scale:
    """Maps low..high to pixels start..end, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return self.start + (self.end - self.start) * ((math.log(value) if self.log else value) - low) / (high - low)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    rules: Sequence[Rule] = (),
    lanes: Sequence[Lane] = (),
    from_zero: bool = False,
    width: int = 380,
    height: int = 240,
    x_note: Callable[[float], str] | None = None,
) -> str:
    """An `<svg>` of the curves, sized by its container; `STYLE` holds its colours.

    Long curves are thinned to about 1,000 points. With `log_y` numbers <= 0 are gaps, with `log_x` all x are above 0; `from_zero` starts
    the y axis at 0.
    `x_note` turns an x into the first line of its tooltip. Raises ValueError when a curve's x and y differ in length.
    """
    curves = [
        (one, _positive(points) if log_y else points)
        for one in series
        for points in [thin(one.x, one.y, 100 if one.form == "dots" else 1000)]
    ]
    rules = [rule for rule in rules if math.isfinite(_clean(rule.y)) and (rule.y > 0 or not log_y)]
    known = [(x, y) for _, points in curves for x, y in points if math.isfinite(y)]
    head, top = _head(curves, rules, title, y_label, width)
    bottom = height - 36 - LANE * len(lanes)
    y_ticks, low, high = _y_axis([y for _, y in known] + [rule.y for rule in rules], log_y, from_zero, max(3, (bottom - top) // 45))
    left = 10 + max(_width(label) for label in [*(label for _, label in y_ticks), *(lane.name for lane in lanes)])
    y_scale = _Scale(low, high, bottom, top, log_y)
    places = [x for x, _ in known] + [x for lane in lanes for x in (*lane.x, *lane.until)]
    x_ticks, x_scale = (_log_x_axis if log_x else _x_axis)(places, left, width - 8)
    body = [
        *(_grid(y_scale(tick), label, left, width - 8) for tick, label in y_ticks),
        *_x_labels(x_ticks, x_scale, x_label, height, width),
        *(f'<line class="rule" x1="{left:.0f}" x2="{width - 8}" y1="{y_scale(r.y):.1f}" y2="{y_scale(r.y):.1f}"/>' for r in rules),
        *(_curve(one, points, x_scale, y_scale) for one, points in curves),
        *_tips(curves, x_scale, top, bottom, x_note or (lambda x: f"{x_label} {x:,g}")),
        *(_lane(lane, x_scale, bottom + LANE * row) for row, lane in enumerate(lanes)),
    ]
    if not known:
        body.append(
            f'<text class="soft" x="{(left + width) / 2:.0f}" y="{(top + bottom) / 2:.0f}" text-anchor="middle">no numbers yet</text>'
        )
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{head}{"".join(body)}</svg>'


def thin(x: Sequence[float], y: Sequence[float | None], limit: int = 1000) -> Points:
    """At most `limit` points with the outline of the whole: ends, and lowest and highest of equal buckets; NaN for a bucket of gaps."""
    values = [_clean(value) for value in y]
    points = list(zip(x, values, strict=True))
    if len(points) <= limit:
        return points
    buckets = (limit - 2) // 2
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        span = range(len(points) * bucket // buckets, len(points) * (bucket + 1) // buckets)
        known = [i for i in span if math.isfinite(values[i])]
        kept |= {min(known, key=values.__getitem__), max(known, key=values.__getitem__)} if known else {span[0]}
    return [points[i] for i in sorted(kept)]


def nice_ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten, integers if `whole`) within low..high, at equal distances."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(multiple for multiple, bound in ((1, 2**0.5), (2, 10**0.5), (5, 50**0.5), (10, math.inf)) if raw / power < bound)
    step = max(step, 1.0) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round numbers within low..high, both positive: the finest of a few customary sets."""
    whole = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, max(1, math.ceil(whole / (count + 1))))
    best: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(ticks) <= count + 1 and (digits == (1,) or powers.step == 1):
            best = ticks
    return best if len(best) > 1 else _three_ticks(low, high, count)


def tick_label(value: float, step: float, largest: float) -> str:
    """The text of a tick whose neighbours are `step` away on an axis that reaches `largest`: 0.25, 1,500, 20k, 2.5M, 3e-7."""
    if abs(value) < step * 1e-6:
        return "0"
    if largest >= 1e15 or step < 0.99e-4:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    else:
        units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k"), (0.0, ""))
        unit, suffix = next((unit, suffix) for unit, suffix in units if largest >= unit)
        unit = {1e4: 1e3, 0.0: 1.0}.get(unit, unit)
        decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
        text = f"{value / unit:,.{decimals}f}{suffix}"
    return text.replace("-", "−")  # noqa: RUF001 (a true minus sign is as wide as a digit)


def _clean(value: float | None) -> float:
    """NaN for what is no usable number, 0 for what is too small to draw."""
    if value is None or not abs(value) <= LARGEST:
        return math.nan
    return 0.0 if abs(value) < SMALLEST else float(value)


def _positive(points: Points) -> Points:
    return [(x, y if y > 0 else math.nan) for x, y in points]


def _width(text: str, size: float = TEXT) -> float:
    return len(text) * size * CHARACTER


Ticks = list[tuple[float, str]]
"""(value, label)."""


def _y_axis(values: list[float], log: bool, from_zero: bool, count: int) -> tuple[Ticks, float, float]:
    """At least two ticks, and the axis' lowest and highest value, a little beyond the numbers."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if log:
        low, high = math.log10(low), math.log10(high)
        pad = max(0.04 * (high - low), 0.02)
        low, high = 10 ** (low - pad), 10 ** (high + pad)
        return [(tick, tick_label(tick, _last_digit(tick), tick)) for tick in log_ticks(low, high, count)], low, high
    low, high = (min(low, 0.0), max(high, 0.0)) if from_zero else _spread(low, high)
    low, high = _spread(low, high) if low == high else (low, high)
    pad = 0.04 * (high - low)
    low, high = low - pad * (not from_zero or low < 0), high + pad
    return _label(_three_ticks(low, high, count)), low, high


def _three_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, never fewer than three."""
    return next(ticks for more in range(10) if len(ticks := nice_ticks(low, high, count + more)) > 2)


def _spread(low: float, high: float) -> tuple[float, float]:
    """The range itself, widened when it is too narrow for distinct labels."""
    size = max(abs(low), abs(high))
    pad = 0.0 if high - low > 1e-9 * size else size / 10 or 1.0
    return low - pad, high + pad


def _last_digit(tick: float) -> float:
    """The power of ten of a round number's last digit: 0.1 for 2.5, 10 for 120."""
    digits = len(f"{tick:.8e}".split("e")[0].rstrip("0").rstrip(".").replace(".", ""))
    return 10.0 ** (math.floor(math.log10(tick) + 1e-9) - digits + 1)


def _label(ticks: list[float]) -> Ticks:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    return [(tick, tick_label(tick, step, max(map(abs, ticks)))) for tick in ticks]


def _x_axis(values: list[float], left: float, right: float) -> tuple[Ticks, _Scale]:
    """Ticks with labels that do not touch, and the scale from x to pixels."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = _spread(0.0 if 0 < low <= 0.1 * high else low, high)
    whole = all(value == int(value) for value in values)
    for count in range(max(2, int(right - left) // 70), 0, -1):
        ticks = _label(nice_ticks(low, high, count, whole) or [low])
        room = (right - left) * (ticks[1][0] - ticks[0][0]) / (high - low) if len(ticks) > 1 else math.inf
        if max(_width(label) for _, label in ticks) + 12 <= room:
            break
    return ticks, _Scale(low, high, left, right)


def _log_x_axis(values: list[float], left: float, right: float) -> tuple[Ticks, _Scale]:
    """The same by logarithm."""
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    low, high = (low, high) if low < high else (low / 2, high * 2)
    scale = _Scale(low, high, left, right, log=True)
    ticks: Ticks = []
    for count in range(max(2, int(right - left) // 60), 0, -1):
        ticks = [(tick, tick_label(tick, _last_digit(tick), tick)) for tick in log_ticks(low, high, count)]
        ends = [(scale(tick) - _width(label) / 2, scale(tick) + _width(label) / 2) for tick, label in ticks]
        if all(after[0] - before[1] > 8 for before, after in itertools.pairwise(ends)):
            break
    return ticks, scale


def _grid(y: float, label: str, left: float, right: float) -> str:
    line = f'<line class="grid" x1="{left:.0f}" x2="{right:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="soft" x="{left - 6:.0f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _x_labels(ticks: Ticks, scale: _Scale, x_label: str, height: int, width: int) -> list[str]:
    bottom = height - 36
    parts = [f'<line class="axis" x1="{scale.start:.0f}" x2="{scale.end:.0f}" y1="{bottom}" y2="{bottom}"/>']
    for tick, label in ticks:
        centre, half = scale(tick), _width(label) / 2
        anchor = "end" if centre + half > width else "middle"
        parts.append(
            f'<text class="soft" x="{centre if anchor == "middle" else width:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{label}</text>'
        )
    parts.append(
        f'<text class="soft" x="{(scale.start + scale.end) / 2:.0f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _head(curves: list[tuple[Series, Points]], rules: Sequence[Rule], title: str, y_label: str, width: int) -> tuple[str, int]:
    """Title with the unit beside or below it, and the legend in as many rows as it needs; returns the text and where the plot begins."""
    y = 13
    parts = [f'<text class="title" x="0" y="{y}">{escape(title)}</text>']
    x = _width(title, 13.5) + 10
    if x + _width(y_label) > width:
        x, y = 0, y + 17
    parts.append(f'<text class="soft" x="{x:.0f}" y="{y}">{escape(y_label)}</text>')
    entries = [(one.name, f"{one.form} hue-{one.hue}") for one, _ in curves if one.name] + [(rule.name, "rule") for rule in rules]
    x, y = 0, y + 19
    for name, style in entries if len(entries) > 1 else []:
        if x and x + 24 + _width(name) > width:
            x, y = 0, y + 17
        dot = f'<circle class="hue-{style[-1]}" cx="{x + 9:.0f}" cy="{y - 4}" r="2.6"/>' if style.startswith("dots") else ""
        parts.append(
            f'<path class="{style}" d="M{x:.0f},{y - 4}h18"/>{dot}<text class="soft" x="{x + 24:.0f}" y="{y}">{escape(name)}</text>'
        )
        x += 24 + _width(name) + 14
    return "".join(parts), y + (14 if len(entries) > 1 else 0)


def _curve(one: Series, points: Points, x_scale: _Scale, y_scale: _Scale) -> str:
    """The path of a curve, broken at gaps; a number between two gaps, and every number of a dotted curve, is a dot."""
    runs: list[list[str]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append(f"{x_scale(x):.1f},{y_scale(y):.1f}")
        elif runs[-1]:
            runs.append([])
    path = "".join("M" + " ".join(run) for run in runs if len(run) > 1)
    dots = [place for run in runs for place in run if one.form == "dots" or len(run) == 1]
    circles = (f'<circle class="hue-{one.hue}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in (place.split(",") for place in dots))
    return (f'<path class="{one.form} hue-{one.hue}" d="{path}"/>' if path else "") + "".join(circles)


def _lane(lane: Lane, scale: _Scale, top: float) -> str:
    """The name, and the marks, those at the same few pixels as one."""
    places: dict[int, list[int]] = {}
    for number, x in enumerate(lane.x):
        places.setdefault(4 * round(scale(x) / 4), []).append(number)
    marks = []
    for place, numbers in places.items():
        width = max((scale(lane.until[number]) - place for number in numbers if lane.until), default=0.0)
        tip = lane.tips[numbers[0]] + (f" (and {len(numbers) - 1} more)" if len(numbers) > 1 else "")
        area = f'x="{place if lane.until else place - 1}" y="{top + 4:.0f}" width="{max(2.0, width):.1f}" height="{LANE - 6}"'
        marks.append(f'<rect class="mark hue-{lane.hue}{" bar" if lane.until else ""}" {area}><title>{escape(tip)}</title></rect>')
    name = f'<text class="soft" x="{scale.start - 6:.0f}" y="{top + LANE - 4:.0f}" text-anchor="end">{escape(lane.name)}</text>'
    return name + "".join(marks)


def _tips(curves: list[tuple[Series, Points]], scale: _Scale, top: float, bottom: float, x_note: Callable[[float], str]) -> list[str]:
    """Invisible strips over the plot whose `<title>` tells x and every curve's value there."""
    drawn = [(one, [(x, y) for x, y in points if math.isfinite(y)]) for one, points in curves if one.name and one.form != "faint"]
    count = min(120, len({x for _, points in drawn for x, _ in points}))
    strips: dict[int, dict[str, tuple[float, float]]] = {}
    for one, points in drawn:
        for x, y in points:
            place = (scale(x) - scale.start) / (scale.end - scale.start)
            strips.setdefault(min(int(place * count), count - 1), {})[one.name] = (x, y)
    step = (scale.end - scale.start) / max(count, 1)
    texts = []
    for strip, values in sorted(strips.items()):
        lines = [x_note(max(x for x, _ in values.values())), *(f"{name}: {y:.4g}" for name, (_, y) in values.items())]
        area = f'x="{scale.start + strip * step:.1f}" y="{top:.0f}" width="{step:.1f}" height="{bottom - top:.0f}"'
        texts.append(f'<rect class="tip" {area}><title>{escape(chr(10).join(lines))}</title></rect>')
    return texts
