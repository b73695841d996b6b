"""Simulated pipelines: the published bubbles, closed forms, and costs that differ from stage to stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.parallel.schedule_actions import RECEIVES, SENDS
from teratron.parallel.schedules import SCHEDULES, build_schedule
from teratron.parallel.simulate import Timeline, peak_activations, simulate

NAMES = {"1F1B": "1f1b", "ZB-H1": "zb-h1", "ZB-H2": "zb-h2", "1F1B-I": "interleaved"}
PUBLISHED = [
    # ranks, micro-batches, forward, inputs, weights, send, chunks if interleaved, published bubbles (arXiv:2401.10241, tables 5 and 9)
    (8, 24, 18.522, 18.086, 9.337, 0.601, 3, {"1F1B": 0.2431, "1F1B-I": 0.1055, "ZB-H1": 0.1585, "ZB-H2": 0.1083}),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 4, {"1F1B": 0.1091, "1F1B-I": 0.0320, "ZB-H1": 0.0554, "ZB-H2": 0.0294}),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 3, {"1F1B": 0.2552, "1F1B-I": 0.1104, "ZB-H1": 0.1397, "ZB-H2": 0.0672}),
]


def agrees_with_the_paper(row: tuple[Any, ...]) -> int:
    """Compare one row's bubbles; how many there were."""
    ranks, batches, forward, inputs, weights, send, chunks, published = row
    for theirs, ours in NAMES.items():
        schedule = build_schedule(ours, ranks, batches, chunks if ours == "interleaved" else 1)
        timeline = simulate(schedule, forward, inputs, weights, send)
        assert timeline.bubble == pytest.approx(1 - batches * (forward + inputs + weights) / timeline.cost, abs=1e-12)
        if ours == "interleaved":
            assert timeline.bubble == pytest.approx(published[theirs], abs=0.004)
        else:
            assert round(timeline.bubble, 4) == published[theirs]
    return len(NAMES)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}x{row[1]}")
def test_published_bubbles(row: tuple[Any, ...]) -> None:
    agrees_with_the_paper(row)


@pytest.mark.slow
def test_all_published_bubbles(shared: Path) -> None:
    rows = json.loads((shared / "specs/published_extra.json").read_text("utf-8"))["pipeline_goldens"]["rows"]
    keys = ["p", "m", "TF", "TB", "TW", "Tcomm", "v_1F1B_I", "bubble"]
    assert sum(agrees_with_the_paper(tuple(row[key] for key in keys)) for row in rows) == 48


@given(st.integers(1, 6), st.integers(0, 10), st.integers(2, 4), st.tuples(*[st.integers(1, 9)] * 3))
@settings(max_examples=25, deadline=None)
def test_closed_forms_without_communication(ranks: int, more: int, chunks: int, costs: tuple[int, int, int]) -> None:
    """The idle time of the papers; with equal costs those of the split backward too."""

    def idle(name: str, batches: int, chunks: int, *costs: float) -> float:
        return simulate(build_schedule(name, ranks, batches, chunks), *costs).cost - batches * sum(costs)

    batches, before = 2 * ranks + more, ranks - 1
    assert idle("gpipe", batches, 1, *costs) == pytest.approx(before * sum(costs))
    assert idle("1f1b", batches, 1, *costs) == pytest.approx(before * sum(costs))
    assert idle("interleaved", ranks * (1 + more), chunks, *costs) == pytest.approx(before * sum(costs) / chunks)
    assert idle("zb-h1", batches, 1, 1, 1, 1) == pytest.approx(before)
    assert idle("zb-h2", batches, 1, 1, 1, 1) == pytest.approx(0)
    assert idle("zbv", batches, 2, 1, 1, 1) == pytest.approx(0)
    assert idle("dualpipev", batches, 2, 1, 1, 1) == pytest.approx(before)


def consistent(timeline: Timeline, send: float) -> None:
    """Nothing overlaps on a rank, and no message is used before it has arrived."""
    sent = {span.action.message: span.end for spans in timeline.spans for span in spans if span.action.kind in SENDS}
    for spans in timeline.spans:
        clock = 0.0
        for span in spans:
            assert span.start >= clock
            assert span.end >= span.start
            clock = span.end
            if span.action.kind in RECEIVES:
                assert span.end >= sent[span.action.message] + send


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 5), st.integers(1, 12), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_time_is_consistent(name: str, ranks: int, batches: int, send: float) -> None:
    schedule = build_schedule(name, ranks, batches, SCHEDULES[name].least_chunks)
    timeline = simulate(schedule, 2.0, 3.0, 1.5, send)
    consistent(timeline, send)
    assert all(len(spans) == len(actions) for spans, actions in zip(timeline.spans, schedule.actions, strict=True))
    busy = [sum(span.end - span.start for span in timeline.computing(rank)) for rank in range(ranks)]
    assert busy == pytest.approx([6.5 * batches] * ranks)
    assert timeline.cost <= timeline.end
    assert timeline.bubble >= -1e-12


def test_a_slow_stage_sets_the_pace() -> None:
    schedule = build_schedule("1f1b", 3, 50, 1)
    even = simulate(schedule, [1, 1, 1], [1, 1, 1], [1, 1, 1])
    assert even.cost == simulate(schedule).cost
    slow = simulate(schedule, [1, 2, 1], [1, 2, 1], [1, 2, 1])
    assert slow.cost == 50 * 6 + 1 + 2 + 1  # the slow stage, a forward before, a backward after, and the wait for its first gradient
    assert slow.bubble > 0.3
    with pytest.raises(ValueError, match="2 costs for 3 stages"):
        simulate(schedule, [1, 2])


def test_peak_in_bytes_of_each_stage() -> None:
    schedule = build_schedule("1f1b", 3, 8, 1)
    assert peak_activations(schedule, [100, 10, 1]) == [300, 20, 1]
    assert peak_activations(build_schedule("zbv", 2, 6, 2), [1, 0, 0, 1]) == [4, 0]
