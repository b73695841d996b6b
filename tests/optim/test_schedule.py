"""Learning-rate schedules: known points, shape, ends."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from teratron.config import OptimConfig
from teratron.optim import learning_rate

WARMUP, TOTAL, HIGH, LOW = 10, 110, 1e-3, 1e-4
KINDS = ("cosine", "linear", "wsd", "inverse_sqrt", "constant")


def config(kind: Any, **changes: Any) -> OptimConfig:
    return OptimConfig(**{"schedule": kind, "lr": HIGH, "min_lr": LOW, "warmup_steps": WARMUP, **changes})


POINTS = [
    ("cosine", 35, LOW + (HIGH - LOW) * (1 + math.sqrt(0.5)) / 2),
    ("cosine", 60, (HIGH + LOW) / 2),
    ("cosine", 110, LOW),
    ("linear", 35, LOW + (HIGH - LOW) * 0.75),
    ("linear", 60, (HIGH + LOW) / 2),
    ("linear", 110, LOW),
    ("wsd", 88, HIGH),
    ("wsd", 99, (HIGH + LOW) / 2),
    ("wsd", 110, LOW),
    ("inverse_sqrt", 40, HIGH / 2),
    ("inverse_sqrt", 90, HIGH / 3),
    ("constant", 110, HIGH),
]


@pytest.mark.parametrize(("kind", "step", "expected"), POINTS)
def test_known_points(kind: str, step: int, expected: float) -> None:
    assert learning_rate(config(kind), step, TOTAL) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_linearly_to_the_highest_rate_which_then_never_rises(kind: str) -> None:
    rates = [learning_rate(config(kind), step, TOTAL) for step in range(1, TOTAL + 1)]
    for step in range(1, WARMUP + 1):
        assert rates[step - 1] == pytest.approx(HIGH * step / WARMUP, rel=1e-12)
    after = rates[WARMUP - 1 :]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    assert max(rates) == pytest.approx(HIGH)
    assert min(after) >= LOW


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_no_jumps(kind: str) -> None:
    """A thousand times finer steps make a thousand times smaller changes (the inverse root is steepest right after the warm-up)."""
    fine = config(kind, warmup_steps=WARMUP * 1000, decay_steps=0)
    rates = [learning_rate(fine, step, TOTAL * 1000) for step in range(1, TOTAL * 1000 + 1)]
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= 1.01 * HIGH / (WARMUP * 1000)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_steps_is_where_the_lowest_rate_begins(kind: str) -> None:
    early = config(kind, decay_steps=60)
    assert learning_rate(early, 35, TOTAL) == pytest.approx((HIGH + LOW) / 2)
    assert learning_rate(early, 59, TOTAL) > LOW
    assert [learning_rate(early, step, TOTAL) for step in (60, 61, 110, 500)] == [LOW] * 4


def test_decay_steps_is_the_length_of_the_last_decay_of_wsd() -> None:
    late = config("wsd", decay_steps=50)
    assert learning_rate(late, 60, TOTAL) == pytest.approx(HIGH)
    assert learning_rate(late, 61, TOTAL) < HIGH
    assert learning_rate(late, 85, TOTAL) == pytest.approx((HIGH + LOW) / 2)


def test_the_inverse_root_stops_at_the_lowest_rate() -> None:
    assert learning_rate(config("inverse_sqrt"), 10**6, 10**7) == LOW


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_close_to_the_highest_rate(kind: str) -> None:
    assert learning_rate(config(kind, warmup_steps=0), 1, TOTAL) == pytest.approx(HIGH, rel=0.01)
