"""Charts: valid SVG for any numbers, everything inside its frame, labels apart, gaps kept, long curves thinned without losing peaks."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.train.charts import Rule, Series, line_chart, log_ticks, nice_ticks, thin, tick_label

numbers = st.one_of(st.none(), st.floats(), st.floats(-10, 10), st.integers(-3, 3).map(float))


def draw(*series: Series, **options: object) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(series, **({"title": "Title", "x_label": "step", "y_label": "unit"} | options)))


def points(chart: ElementTree.Element) -> list[tuple[float, float]]:
    """Every place that a curve or a dot touches."""
    paths = [path.get("d", "") for path in chart.iter("path") if "h18" not in path.get("d", "")]
    pairs = [pair for path in paths for pair in re.split("[M ]", path) if pair]
    dots = [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in chart.iter("circle")]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)] + dots


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(numbers, max_size=12), st.booleans(), st.booleans(), st.sampled_from(["line", "faint", "dots"]))
def test_any_numbers_give_a_chart_inside_its_frame(values: list[float | None], log: bool, zero: bool, form: str) -> None:
    chart = draw(Series("a & b", range(len(values)), values, form=form), log_y=log, from_zero=zero, rules=[Rule("<r>", 0.5)])
    assert all(0 <= x <= 380 and 0 <= y <= 240 for x, y in points(chart))
    usable = [v for v in values if v is not None and abs(v) <= 1e250 and (not log or v >= 1e-250)]
    assert bool(points(chart)) == bool(usable) or form == "dots"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5), st.booleans())
def test_labels_never_touch_and_tell_ticks_apart(values: list[float], log: bool) -> None:
    chart = draw(Series("a", range(len(values)), values), log_y=log)
    axis = [text for text in chart.iter("text") if text.get("text-anchor") == "end" and float(text.get("y", "0")) < 205]
    heights = sorted(float(text.get("y", "0")) for text in axis)
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))
    assert len({text.text for text in axis}) == len(axis) >= 2


@pytest.mark.parametrize("largest", [1, 7, 30, 999, 12_345, 1_000_000, 3_000_000_000])
@pytest.mark.parametrize("width", [320, 1000])
def test_step_labels_do_not_overlap(largest: int, width: int) -> None:
    chart = draw(Series("a", [1, largest], [1.0, 2.0]), width=width)
    labels = [text for text in chart.iter("text") if text.get("y") == "220"]
    assert labels
    ends = -math.inf
    for label in labels:
        x, size = float(label.get("x", "0")), len(label.text or "") * 7
        start = x - size if label.get("text-anchor") == "end" else x - size / 2
        assert start > ends
        ends = start + size
    assert ends <= width + 4


@settings(deadline=None, derandomize=True)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 10))
def test_ticks_are_round_equally_spaced_and_inside(low: float, size: float, count: int) -> None:
    ticks = nice_ticks(low, low + size, count)
    step = size if len(ticks) < 2 else ticks[1] - ticks[0]
    assert 1 <= len(ticks) <= 2 * count
    assert all(low - step * 1e-6 <= tick <= low + size + step * 1e-6 for tick in ticks)
    if len(ticks) > 2:
        mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - nice) for nice in (1, 2, 5)) < 1e-3


def test_whole_numbers_get_whole_ticks() -> None:
    assert nice_ticks(1, 3, 8, whole=True) == [1, 2, 3]


def test_logarithmic_ticks_are_customary_numbers() -> None:
    assert log_ticks(1.4, 5.2, 7) == [1.5, 2, 2.5, 3, 4, 5]
    assert log_ticks(0.5, 2000, 4) == [1, 10, 100, 1000]
    assert len(log_ticks(1e-12, 1e12, 5)) <= 6


@pytest.mark.parametrize(
    ("value", "step", "largest", "text"),
    [
        (0.25, 0.05, 0.5, "0.25"),
        (1500, 500, 3000, "1,500"),
        (20_000, 5000, 30_000, "20k"),
        (2_500_000, 500_000, 4e6, "2.5M"),
        (3e-7, 1e-7, 5e-7, "3e−7"),  # noqa: RUF001 (the minus sign of the labels)
        (-2, 1, 3, "−2"),  # noqa: RUF001
        (1e-20, 1, 3, "0"),
    ],
)
def test_tick_labels(value: float, step: float, largest: float, text: str) -> None:
    assert tick_label(value, step, largest) == text


def test_thinning_keeps_ends_peaks_order_and_gaps() -> None:
    y: list[float | None] = [math.sin(i / 500) for i in range(50_000)]
    y[12_345], y[40_001] = 99.0, -99.0
    y[20_000:30_000] = [None] * 10_000
    kept = thin(range(50_000), y)
    assert len(kept) <= 1000
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert {(0, y[0]), (49_999, y[-1]), (12_345, 99.0), (40_001, -99.0)} <= set(kept)
    inside = [value for x, value in kept if 20_200 <= x < 29_800]
    assert inside
    assert all(math.isnan(value) for value in inside)


def test_short_curves_are_kept_whole() -> None:
    assert thin([1, 2, 3], [1.0, 0.0, 5.0]) == [(1, 1.0), (2, 0.0), (3, 5.0)]


def test_a_gap_breaks_the_line_and_a_lone_number_is_a_dot() -> None:
    chart = draw(Series("a", range(7), [1, 2, None, 3, math.nan, 4, 5]))
    (path,) = [path.get("d", "") for path in chart.iter("path")]
    assert path.count("M") == 2
    assert len(list(chart.iter("circle"))) == 1


def test_larger_is_higher_on_both_kinds_of_axis() -> None:
    for log in (False, True):
        heights = [y for _, y in points(draw(Series("a", [1, 2, 3], [1.0, 10.0, 100.0]), log_y=log))]
        assert heights == sorted(heights, reverse=True)
        middle = (heights[0] + heights[2]) / 2
        assert (abs(heights[1] - middle) < 0.2) == log


def test_a_rule_lies_at_its_value() -> None:
    chart = draw(Series("a", [0, 1], [0.0, 4.0]), rules=[Rule("level", 4.0)])
    (rule,) = [line for line in chart.iter("line") if line.get("class") == "rule"]
    assert float(rule.get("y1", "nan")) == min(y for _, y in points(chart))
    assert "level" in [text.text for text in chart.iter("text")]


def test_tooltips_tell_x_and_every_curve_but_faint_ones() -> None:
    curves = [Series("first", [1, 2], [0.5, 0.25]), Series("second", [2], [8.0], 2, "dots"), Series("raw", [1, 2], [3, 4], form="faint")]
    tips = [tip.text for tip in draw(*curves, x_note=lambda x: f"at {x:g}").iter("title")]
    assert tips == ["at 1\nfirst: 0.5", "at 2\nfirst: 0.25\nsecond: 8"]


def test_curves_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        draw(Series("a", [1, 2], [1.0]))


def test_a_chart_without_numbers_says_so() -> None:
    assert "no numbers yet" in [text.text for text in draw(Series("a", [1], [None])).iter("text")]


def test_a_logarithmic_x_axis_puts_equal_factors_at_equal_distances() -> None:
    rates = [1e-5, 1e-4, 1e-3, 1e-2]
    drawn = line_chart([Series("loss", rates, [4.0, 3.0, 2.0, 1.0])], title="", x_label="rate", y_label="", log_x=True)
    path = re.search(r'<path class="line hue-1" d="M([^"]+)"', drawn)
    assert path is not None
    places = [float(point.split(",")[0]) for point in path[1].split()]
    assert [after - before for before, after in itertools.pairwise(places)] == pytest.approx([places[1] - places[0]] * 3, abs=0.2)
    assert ">0.001</text>" in drawn


def test_a_curve_without_a_name_stands_in_no_legend_and_no_tooltip() -> None:
    curves = [Series("", [1, 2], [3.0, 4.0]), Series("one", [1, 2], [1.0, 2.0]), Series("two", [1, 2], [5.0, 6.0])]
    drawn = line_chart(curves, title="", x_label="step", y_label="")
    assert drawn.count('<path class="line') == 3 + 2, "three curves, two lines of the legend"
    assert "<title>step 1\none: 1\ntwo: 5</title>" in drawn
