"""Evaluation on held-out windows: the same terms and counts as in training, every token once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from teratron.models import GPT
from teratron.objectives import Batch, Objective


@torch.no_grad()
def evaluate(model: GPT, objective: Objective, batches: Iterable[Batch]) -> float:
    """The loss over all batches together: for each term sum / count over everything, weighted. Nothing is dropped."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    weights: dict[str, float] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + float(count)
        for term in objective.terms(model, model(objective.inputs(batch)), batch):
            sums[term.name] = sums.get(term.name, 0.0) + float(term.sum)
            weights[term.name] = term.weight
    return sum(weights[name] * sums[name] / max(counts[name], 1e-30) for name in sums)
