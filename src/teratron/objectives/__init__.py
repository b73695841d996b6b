"""Objectives: a batch becomes loss terms; the loss is exact over the global batch (contract C2)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from teratron.config import ObjectiveConfig
from teratron.models import Model, State
from teratron.objectives.layers import layer_counts, layer_loads, layer_terms
from teratron.objectives.next_token import NextToken
from teratron.objectives.terms import Batch, Tally, Term, total_loss

__all__ = [
    "Batch",
    "NextToken",
    "Objective",
    "Tally",
    "Term",
    "build_objective",
    "layer_counts",
    "layer_loads",
    "layer_terms",
    "total_loss",
]


class Objective(Protocol):
    """What is learned: which tensors enter the model, and which terms are measured at its head."""

    def inputs(self, batch: Batch) -> State:
        """The model's first state."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The denominator of each term: depends on the batch alone, is summed over the global batch before the first forward."""

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        """The terms of a micro-batch from the model's last state."""


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `objective.name` asks for."""
    return {"next_token": NextToken}[config.name](config.label_smoothing)
