"""Schedules of learning rate and weight decay: known points, shape, ends, and the clock that they go by."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from teratron.config import Config
from teratron.optim import learning_rate
from teratron.optim.schedule import optim_at, weight_decay

WARMUP, TOTAL, HIGH, LOW = 10, 110, 1e-3, 1e-4
KINDS = ("cosine", "linear", "wsd", "inverse_sqrt", "constant")
SHAPES = ("linear", "cosine", "sqrt", "exponential")


def config(kind: str, steps: int = TOTAL, **changes: Any) -> Config:
    values = {"schedule": kind, "lr": HIGH, "min_lr": LOW, "warmup_steps": WARMUP, **changes}
    return Config().override(
        {"train.steps": steps, **{name.replace("__", ".") if "__" in name else f"optim.{name}": v for name, v in values.items()}}
    )


def rates(config: Config) -> list[float]:
    return [learning_rate(config, step) for step in range(1, config.train.steps + 1)]


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
    assert learning_rate(config(kind), step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_linearly_to_the_highest_rate_which_then_never_rises(kind: str) -> None:
    found = rates(config(kind))
    for step in range(1, WARMUP + 1):
        assert found[step - 1] == pytest.approx(HIGH * step / WARMUP, rel=1e-12)
    after = found[WARMUP - 1 :]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    assert max(found) == pytest.approx(HIGH)
    assert min(after) >= LOW


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_no_jumps(kind: str) -> None:
    """A hundred times finer steps make a hundred times smaller changes (the inverse root is steepest right after the warm-up)."""
    found = rates(config(kind, TOTAL * 100, warmup_steps=WARMUP * 100, decay_steps=0))
    assert max(abs(b - a) for a, b in itertools.pairwise(found)) <= 1.01 * HIGH / (WARMUP * 100)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_steps_is_where_the_lowest_rate_begins(kind: str) -> None:
    early = config(kind, decay_steps=60)
    assert learning_rate(early, 35) == pytest.approx((HIGH + LOW) / 2)
    assert learning_rate(early, 59) > LOW
    assert [learning_rate(early, step) for step in (60, 61, 110, 500)] == [LOW] * 4


def test_decay_steps_is_the_length_of_the_last_decay_of_wsd() -> None:
    late = config("wsd", decay_steps=50)
    assert learning_rate(late, 60) == pytest.approx(HIGH)
    assert learning_rate(late, 61) < HIGH
    assert learning_rate(late, 85) == pytest.approx((HIGH + LOW) / 2)


def falling(shape: str, ratio: float) -> float:
    """Megatron-LM's `lr_wsd_decay_style`, of the share of the decay that is over."""
    return {
        "linear": 1 - ratio,
        "cosine": 0.5 * (math.cos(math.pi * ratio) + 1),
        "sqrt": 1 - math.sqrt(ratio),
        "exponential": 2 * 0.5**ratio - 1,
    }[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_the_last_decay_of_wsd(shape: str) -> None:
    late = config("wsd", decay_steps=50, decay_shape=shape)
    assert learning_rate(late, 60) == pytest.approx(HIGH)
    for step in range(61, TOTAL + 1):
        assert learning_rate(late, step) == pytest.approx(LOW + (HIGH - LOW) * falling(shape, (step - 60) / 50), rel=1e-12)


def test_the_inverse_root_stops_at_the_lowest_rate() -> None:
    assert learning_rate(config("inverse_sqrt", 10**7), 10**6) == LOW


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_close_to_the_highest_rate(kind: str) -> None:
    assert learning_rate(config(kind, warmup_steps=0), 1) == pytest.approx(HIGH, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clock", ["steps", "tokens"])
def test_steps_shares_and_tokens_say_the_same_while_batches_stay_the_same(kind: str, clock: str) -> None:
    """At 4 sequences of 1,024 tokens, 11 of 110 steps are 10 % or 45,056 tokens."""
    keys = {"train__global_batch": 4, "clock": clock}
    expected = rates(config(kind, warmup_steps=11, decay_steps=33, **keys))
    assert rates(config(kind, warmup_steps="10%", decay_steps="30%", **keys)) == pytest.approx(expected, rel=1e-12)
    assert rates(config(kind, warmup_steps="45.056k tokens", decay_steps="135168 tokens", **keys)) == pytest.approx(expected, rel=1e-12)


GROWING = {"train__global_batch": 16, "train__batch_schedule": "0:4, 50:16"}
"""4 sequences in the first 50 steps, 16 in the other 60: 200 + 960 sequences."""


def test_tokens_of_a_ramped_batch_are_counted_as_they_come() -> None:
    """600 sequences are 50 steps of 4 and 25 of 16."""
    length = f"{600 * 1024} tokens"
    by_steps, by_tokens = (config("cosine", warmup_steps=0, decay_steps=length, clock=clock, **GROWING) for clock in ("steps", "tokens"))
    for made in (by_steps, by_tokens):
        assert learning_rate(made, 74) > LOW
        assert learning_rate(made, 75) == pytest.approx(LOW, rel=1e-12)
    assert learning_rate(by_steps, 50) == pytest.approx(LOW + (HIGH - LOW) * falling("cosine", 50 / 75))
    assert learning_rate(by_tokens, 50) == pytest.approx(LOW + (HIGH - LOW) * falling("cosine", 200 / 600))


def test_the_clock_of_tokens_warms_up_by_tokens() -> None:
    made = config("linear", warmup_steps=60, clock="tokens", **GROWING)
    assert learning_rate(made, 50) == pytest.approx(HIGH * 200 / 360)
    assert learning_rate(made, 60) == pytest.approx(HIGH)
    assert learning_rate(made, 110) == pytest.approx(LOW)


def test_the_last_decay_of_wsd_is_measured_from_the_end() -> None:
    """The last 480 sequences are the last 30 steps."""
    for clock in ("steps", "tokens"):
        made = config("wsd", decay_steps=f"{480 * 1024} tokens", clock=clock, **GROWING)
        assert learning_rate(made, 80) == pytest.approx(HIGH)
        assert learning_rate(made, 95) == pytest.approx((HIGH + LOW) / 2)


@pytest.mark.parametrize(("ramp", "half"), [("linear", 0.25), ("cosine", (1 - math.sqrt(0.5)) / 2)])
def test_the_weight_decay_goes_from_its_start_to_its_value(ramp: str, half: float) -> None:
    """By Megatron-LM's formulas, in which the last step has the end's."""
    made = config("constant", steps=100, weight_decay=0.1, weight_decay_start=0.5, weight_decay_ramp=ramp)
    assert weight_decay(made, 25) == pytest.approx(0.5 - 0.4 * half)
    assert weight_decay(made, 50) == pytest.approx(0.3)
    assert weight_decay(made, 100) == 0.1
    assert optim_at(made, 50).weight_decay == pytest.approx(0.3)
    assert optim_at(made, 100) is made.optim
