"""Evaluation on held-out windows: the same terms and counts as in training, every token once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from teratron.models import GPT
from teratron.objectives import Batch, Objective, Tally


@torch.no_grad()
def evaluate(model: GPT, objective: Objective, batches: Iterable[Batch]) -> Tally:
    """The terms over all batches together, so that each is its sum over everything / its count. Nothing is dropped out."""
    tally = Tally()
    for batch in batches:
        tally.count(objective.counts(batch))
        tally.add(objective.terms(model, model(objective.inputs(batch)), batch))
    return tally
