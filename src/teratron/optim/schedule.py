"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from teratron.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The learning rate of step 1, 2, ... of a run of `total` steps: linear warm-up, then `optim.schedule`.

    The formulas are Megatron-LM's with our step k at its k: warm-up reaches the maximum at step warmup_steps.
    """
    if config.schedule == "range":
        return config.min_lr * (config.lr / config.min_lr) ** ((step - 1) / max(total - 1, 1))
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / step))
    return config.min_lr + (config.lr - config.min_lr) * _decay(config, step, total)


def _decay(config: OptimConfig, step: int, total: int) -> float:
    """From 1 (highest rate) to 0 (lowest)."""
    if config.schedule == "wsd":
        length = config.decay_steps or max(total // 5, 1)
        return min(1.0, max(0.0, (total - step) / length))
    end = config.decay_steps or total
    ratio = min(1.0, (step - config.warmup_steps) / max(end - config.warmup_steps, 1))
    return 1 - ratio if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * ratio))
