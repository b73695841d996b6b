"""Optimizers on flat buckets, loss scaling, learning-rate schedules."""

from __future__ import annotations

from teratron.config import OptimConfig
from teratron.optim.adafactor import Adafactor
from teratron.optim.elementwise import SGD, Adam, AdamW
from teratron.optim.lamb import Lamb
from teratron.optim.lion import Lion
from teratron.optim.muon import Muon
from teratron.optim.optimizer import Optimizer, global_norm
from teratron.optim.scale import LossScale
from teratron.optim.schedule import learning_rate, optim_at
from teratron.optim.schedule_free import ScheduleFree
from teratron.parallel.flat import FlatModel

__all__ = ["OPTIMIZERS", "LossScale", "Optimizer", "build_optimizer", "global_norm", "learning_rate", "optim_at"]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "lion": Lion,
    "lamb": Lamb,
    "muon": Muon,
    "adafactor": Adafactor,
    "schedule_free": ScheduleFree,
}
"""By `optim.name`."""


def build_optimizer(flat: FlatModel, config: OptimConfig, seed: int = 0) -> Optimizer:
    """The optimizer that `optim.name` asks for."""
    return OPTIMIZERS[config.name](flat, config, seed)
