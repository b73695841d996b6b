"""What objectives exchange with the loop: batches in, terms out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One term of the loss, summed over a micro-batch; the loop divides by the count over the global batch."""

    name: str
    sum: Tensor
    weight: float = 1.0
