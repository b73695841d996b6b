"""Training: the loop, evaluation, metrics, the run directory, the report."""

from teratron.train.trainer import Result, Trainer

__all__ = ["Result", "Trainer"]
