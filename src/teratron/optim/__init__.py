"""Optimizers on flat buffers and learning-rate schedules."""

from teratron.optim.adamw import AdamW
from teratron.optim.schedule import learning_rate

__all__ = ["AdamW", "learning_rate"]
