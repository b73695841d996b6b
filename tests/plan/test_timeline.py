"""The picture of a pipeline: text and SVG show every action, in order, within their bounds."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.parallel.schedules import SCHEDULES, build_schedule
from teratron.parallel.simulate import Timeline, simulate
from teratron.plan.timeline import timeline_svg, timeline_text

SVG = "{http://www.w3.org/2000/svg}"


def drawn(name: str, ranks: int, batches: int, send: float = 0.0) -> Timeline:
    return simulate(build_schedule(name, ranks, batches, SCHEDULES[name].least_chunks), send=send)


def rows(text: str) -> list[str]:
    return [line.split("|")[1] for line in text.splitlines() if line.startswith("rank ")]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_text_with_room_holds_every_action_in_order(name: str) -> None:
    timeline = drawn(name, 3, 7)
    text = timeline_text(timeline, 400)
    for rank, row in enumerate(rows(text)):
        parts = [part for span in timeline.computing(rank) for part in span.action.computations]
        assert [(letter.upper(), int(number)) for letter, number in re.findall(r"([A-Za-z])(\d+)", row)] == [
            (part.kind.value, part.micro_batch) for part in parts
        ]
        stages = timeline.schedule.placement[rank]
        assert [letter.islower() for letter in re.findall("[A-Za-z]", row)] == [stages.index(part.stage) == 1 for part in parts]


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 12), st.integers(1, 60), st.integers(60, 200), st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_text_fits_the_terminal(name: str, ranks: int, batches: int, width: int, send: float) -> None:
    timeline = drawn(name, ranks, batches, send)
    text = timeline_text(timeline, width)
    assert max(len(line) for line in text.splitlines()) <= width
    lines = rows(text)
    assert len(lines) == ranks
    assert len({len(line) for line in lines}) == 1
    assert f"bubble {100 * timeline.bubble:.1f} %" in text


def test_text_shows_idle_time_to_scale() -> None:
    """Of a wide enough picture the share of dots is the bubble, as all ranks of GPipe wait equally long."""
    timeline = drawn("gpipe", 4, 5)
    for row in rows(timeline_text(timeline, 300)):
        assert row.count("·") / len(row) == pytest.approx(timeline.bubble)
    assert timeline.bubble == pytest.approx(3 / 8)


def test_legend_names_what_is_there() -> None:
    assert "backward of weights" not in timeline_text(drawn("1f1b", 2, 4))
    assert "second chunk" not in timeline_text(drawn("1f1b", 2, 4))
    text = timeline_text(drawn("dualpipev", 2, 8))
    assert all(words in text for words in ["F forward", "W backward of weights", "X forward and backward at once", "second chunk"])


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_svg_holds_every_cell_inside_its_row(name: str) -> None:
    timeline = drawn(name, 3, 6)
    root = ElementTree.fromstring(timeline_svg(timeline))
    width, height = (float(root.attrib[key]) for key in ("width", "height"))
    cells = [
        tuple(map(float, cell))
        for path in root.iter(f"{SVG}path")
        for cell in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", path.attrib["d"])
    ]
    parts = [part for rank in range(3) for span in timeline.computing(rank) for part in span.action.computations]
    assert len(cells) == len(parts)
    assert all(x >= 74 and x + wide <= width - 70 and y >= 86 and y + tall <= height for x, y, wide, tall in cells)
    group = next(one for one in root.iter(f"{SVG}g") if one.attrib["class"] == "cells")
    assert sorted(int(text.text or "") for text in group.iter(f"{SVG}text")) == sorted(part.micro_batch for part in parts)
    title = root.findtext(f"{SVG}title") or ""
    assert name in title
    assert f"bubble {100 * timeline.bubble:.1f} %" in title


def test_svg_of_a_large_pipeline_stays_small() -> None:
    """Without room there are no numbers, and all cells of a colour are one path."""
    root = ElementTree.fromstring(timeline_svg(drawn("zb-h1", 8, 200)))
    assert len(list(root.iter())) < 100
    assert sum(path.attrib["d"].count("M") for path in root.iter(f"{SVG}path")) == 8 * 200 * 3
