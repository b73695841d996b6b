"""The loss scale follows Megatron-LM's rules: bad steps add up until the scale has grown, clean ones count since the last bad one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teratron.config import OptimConfig
from teratron.optim import LossScale


class Rules:
    """The rules as Megatron-LM words them: a tracker that clean steps raise, and one that bad steps lower."""

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.scale, self.growth, self.hysteresis = config.initial_loss_scale, 0, config.loss_scale_hysteresis

    def update(self, overflow: bool) -> None:
        if overflow:
            self.growth = 0
            self.hysteresis -= 1
            if self.hysteresis <= 0:
                self.scale = max(self.scale * 0.5, self.config.min_loss_scale)
            return
        self.growth += 1
        if self.growth == self.config.loss_scale_window:
            self.growth, self.hysteresis = 0, self.config.loss_scale_hysteresis
            self.scale *= 2


starts, lows = st.sampled_from([1.0, 8.0, 2.0**10]), st.sampled_from([0.25, 1.0])


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5), st.integers(1, 4), starts, lows)
def test_any_run_follows_the_rules(finite: list[bool], window: int, hysteresis: int, start: float, low: float) -> None:
    config = OptimConfig(initial_loss_scale=start, min_loss_scale=low, loss_scale_window=window, loss_scale_hysteresis=hysteresis)
    scale, rules = LossScale.start(config, "fp16"), Rules(config)
    for good in finite:
        scale = scale.after(good, config, "fp16")
        rules.update(not good)
        assert scale.scale == rules.scale


def scales(outcomes: list[bool]) -> list[float]:
    """The scale after each step under the default rules, as powers of two."""
    config = OptimConfig()
    scale, found = LossScale.start(config, "fp16"), []
    for good in outcomes:
        scale = scale.after(good, config, "fp16")
        found.append(scale.scale)
    return found


def test_the_defaults_are_megatrons() -> None:
    """2^32; doubled by every 1000 clean steps; halved by the second overflow and each further one; never below 1."""
    assert LossScale.start(OptimConfig(), "fp16").scale == 2.0**32
    assert scales([True] * 2000)[998:1001] == [2.0**32, 2.0**33, 2.0**33]
    assert scales([True] * 2000)[1998:] == [2.0**33, 2.0**34]
    assert scales([False, True, True, False, True, False]) == [2.0**32] * 3 + [2.0**31] * 2 + [2.0**30], "bad steps add up"
    assert scales([False] * 40)[-8:] == [1.0] * 8
    grown = scales([False, *[True] * 1000, False, False])
    assert grown[-3:] == [2.0**33, 2.0**33, 2.0**32], "growth forgives the first one"


@pytest.mark.parametrize("good", [True, False])
def test_a_fixed_scale_and_other_precisions_stay(good: bool) -> None:
    fixed = OptimConfig(loss_scale=128.0, loss_scale_window=1, loss_scale_hysteresis=1)
    scale = LossScale.start(fixed, "fp16")
    assert scale.scale == 128
    assert scale.after(good, fixed, "fp16") == scale
    free = OptimConfig(loss_scale_window=1, loss_scale_hysteresis=1)
    for precision in ("fp32", "bf16", "fp64"):
        assert LossScale.start(free, precision) == LossScale()
        assert LossScale().after(good, free, precision).scale == 1
