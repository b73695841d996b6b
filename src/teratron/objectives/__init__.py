"""Objectives: a batch becomes loss terms; the loss is exact over the global batch (contract C2)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from teratron.config import Config
from teratron.data.samples import Samples
from teratron.data.special import Needs, SpecialTokens
from teratron.models import Model, State
from teratron.objectives.compared import Pointing, Preferred, Similar
from teratron.objectives.denoising import Denoising
from teratron.objectives.given import Classes, Pooled, Supervised
from teratron.objectives.layers import layer_counts, layer_loads, layer_terms
from teratron.objectives.masked import Masked
from teratron.objectives.next_token import NextToken
from teratron.objectives.permuted import Permuted
from teratron.objectives.prefix import PrefixLM
from teratron.objectives.span_corruption import SpanCorruption
from teratron.objectives.terms import Batch, Tally, Term, total_loss
from teratron.objectives.ul2 import MixtureOfDenoisers

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
    """What is learned: how raw rows become a batch, which tensors enter the model, and which terms are measured at its head."""

    needs: Needs
    """What it asks of the data."""

    def prepare(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> Batch:
        """The batch of the samples `index` [B]: a function of the rows, the seed and the index alone (contract C4).

        Whatever is drawn is drawn for (seed, index), on whole sequences: an index that comes once more with the same row, as in
        evaluation, is drawn alike; training never comes back to an index, so that each epoch has draws of its own. Tensors
        are [B, S]; what weighs a term has a name that ends in `weights`, so that evaluation can silence rows.
        """

    def __init__(self, config: Config) -> None: ...

    def inputs(self, batch: Batch) -> State:
        """The model's first state."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The denominator of each term: depends on the batch alone, is summed over the global batch before the first forward."""

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        """The terms of a micro-batch from the model's last state."""


OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "masked": Masked,
    "permuted": Permuted,
    "span_corruption": SpanCorruption,
    "denoising": Denoising,
    "prefix": PrefixLM,
    "ul2": MixtureOfDenoisers,
    "supervised": Supervised,
    "classes": Classes,
    "pooled": Pooled,
    "pointing": Pointing,
    "similar": Similar,
    "preferred": Preferred,
}


def build_objective(config: Config) -> Objective:
    """The objective that `objective.name` asks for."""
    return OBJECTIVES[config.objective.name](config)
