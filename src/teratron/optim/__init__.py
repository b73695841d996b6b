"""Optimizers on flat buckets, loss scaling, learning-rate schedules."""

from __future__ import annotations

from teratron.config import OptimConfig
from teratron.optim.adamw import AdamW
from teratron.optim.optimizer import Optimizer, global_norm
from teratron.optim.scale import LossScale
from teratron.optim.schedule import learning_rate
from teratron.parallel.flat import FlatModel

__all__ = ["AdamW", "LossScale", "Optimizer", "build_optimizer", "global_norm", "learning_rate"]


def build_optimizer(flat: FlatModel, config: OptimConfig) -> Optimizer:
    """The optimizer that `optim.name` asks for."""
    return {"adamw": AdamW}[config.name](flat, config)
