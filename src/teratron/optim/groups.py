"""How each part of a model is treated: its share of the learning rate and its weight decay."""

from __future__ import annotations

from dataclasses import dataclass

from teratron.config import OptimConfig
from teratron.models import Part


@dataclass(frozen=True)
class Treatment:
    """What an update does to a part, beside what it does to all."""

    lr: float = 1.0
    """Factor of the learning rate."""
    decay: float = 0.0
    """Weight decay."""


def treatment_of(part: Part, config: OptimConfig) -> Treatment:
    """Matrices decay, biases and norms do not: Megatron-LM's rule."""
    return Treatment(decay=config.weight_decay if len(part.shape) > 1 else 0.0)
