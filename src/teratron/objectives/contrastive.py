"""The contrastive term beside next-token prediction: it keeps the final states of different tokens apart (SimCTG, Su et al. 2022)."""

from __future__ import annotations

from torch import Tensor

from teratron.config import ObjectiveConfig
from teratron.models import Model, State
from teratron.objectives.terms import Batch, Term


class Contrast:
    """A mean over all ordered pairs of different tokens of one document, each pair weighed by the product of their weights.

    Sequences of one length count alike, as in the paper's mean of their means; what has no weight, such as padding, is in no pair.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.weight, self.margin = config.contrastive, config.margin

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"contrastive": pair_count(batch["weights"], batch.get("segments"))} if self.weight else {}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        """Of the last stage; a model without the term has none."""
        if not self.weight:
            return []
        alike = model.head.contrast(state["hidden"], batch["weights"], batch.get("segments"), self.margin)
        return [Term("contrastive", alike, self.weight)]


def pair_count(weights_BS: Tensor, segments_BS: Tensor | None) -> Tensor:
    """The sum of w_i w_j over ordered pairs of different tokens of one document, without making the pairs. A float64 scalar."""
    weights = weights_BS.double()
    if segments_BS is None:
        sums = weights.sum(1)
    else:
        sums = weights.new_zeros(weights.shape[0], weights.shape[1] + 1)  # -1, the segment of padding, is the first column
        sums.scatter_add_(1, segments_BS + 1, weights)
    return sums.square().sum() - weights.square().sum()
