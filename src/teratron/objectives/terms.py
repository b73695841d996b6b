"""What objectives exchange with the loop: batches in, terms out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One term of the loss, summed over a micro-batch; the loop divides by the count over the global batch."""

    name: str
    sum: Tensor
    weight: float | Tensor = 1.0


def total_loss(terms: Iterable[Term], counts: Mapping[str, Tensor]) -> Tensor:
    """Sum over terms of weight * sum / count, the counts those of the whole global batch. A float64 scalar."""
    losses = [term.weight * term.sum / counts[term.name].clamp(min=1e-30) for term in terms]
    return torch.stack(losses).sum()


@dataclass
class Tally:
    """Terms added up over micro-batches, in float64 and without a device synchronisation."""

    sums: dict[str, Term] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, terms: Iterable[Term]) -> None:
        """Add a micro-batch's sums."""
        for term in terms:
            before = self.sums[term.name].sum if term.name in self.sums else 0.0
            self.sums[term.name] = Term(term.name, before + term.sum.detach().double(), term.weight)

    def count(self, counts: Mapping[str, Tensor]) -> None:
        """Add counts."""
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, torch.zeros_like(count)) + count

    def loss(self) -> float:
        """The weighted sum of all terms' means."""
        return float(total_loss(self.sums.values(), self.counts))

    def means(self) -> dict[str, float]:
        """Each term as sum / count."""
        return {name: float(term.sum / self.counts[name].clamp(min=1e-30)) for name, term in self.sums.items()}
