"""Learning rate and weight decay as pure functions of the config and the step."""

from __future__ import annotations

import math
from dataclasses import replace

from teratron.config import Config, OptimConfig
from teratron.config.lengths import Length, parse_length


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up, then `optim.schedule`, both by `optim.clock`.

    The formulas are Megatron-LM's with our step k at its k: warm-up reaches the maximum at the step where it ends.
    """
    optim, clock = config.optim, config.clock
    if optim.schedule == "range":
        return optim.min_lr * (optim.lr / optim.min_lr) ** ((step - 1) / max(config.train.steps - 1, 1))
    now, risen = clock.now(step), clock.after(parse_length(optim.warmup_steps, "optim.warmup_steps"))
    if now <= risen:
        return optim.lr * now / risen
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(max(risen, clock.now(1)) / now))
    start, end = _decay(config, risen)
    left = 1 - min(1.0, max(0.0, (now - start) / max(end - start, 1)))
    shape = optim.decay_shape if optim.schedule == "wsd" else optim.schedule
    return optim.min_lr + (optim.lr - optim.min_lr) * _falling(shape, left)


def weight_decay(config: Config, step: int) -> float:
    """The weight decay of a step of all parts whose group does not name its own, by `optim.weight_decay_ramp` (Megatron-LM's formulas)."""
    optim, clock = config.optim, config.clock
    if optim.weight_decay_ramp == "none":
        return optim.weight_decay
    left = 1 - min(1.0, clock.now(step) / clock.now(config.train.steps))
    return optim.weight_decay + (optim.weight_decay_start - optim.weight_decay) * _falling(optim.weight_decay_ramp, left)


def optim_at(config: Config, step: int) -> OptimConfig:
    """The optimizer's config in a step: that of the run with the step's weight decay."""
    decay = weight_decay(config, step)
    return config.optim if decay == config.optim.weight_decay else replace(config.optim, weight_decay=decay)


def _decay(config: Config, risen: float) -> tuple[float, float]:
    """When the decay begins and ends; risen: when the warm-up ends."""
    optim, clock, steps = config.optim, config.clock, config.train.steps
    length = parse_length(optim.decay_steps, "optim.decay_steps")
    if optim.schedule == "wsd":
        return clock.before_end(length if length.amount else Length(max(steps // 5, 1), "steps")), clock.now(steps)
    return risen, clock.after(length) if length.amount else clock.now(steps)


def _falling(shape: str, left: float) -> float:
    """From 1 to 0 while what is left of the way falls from 1 to 0."""
    if shape == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    if shape == "sqrt":
        return 1 - math.sqrt(1 - left)
    return 2**left - 1 if shape == "exponential" else left
