"""Next-token prediction: cross-entropy of each token given those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from teratron.models import Model, State
from teratron.objectives.terms import Batch, Term


class NextToken:
    """Targets are the tokens one place on, shifted before any cut.

    smoothing: the share of each target's probability that is spread over the whole vocabulary.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def inputs(self, batch: Batch) -> State:
        return {name: batch[name] for name in ("tokens", "positions", "segments", "real") if name in batch}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        # float64: a float32 sum of uneven weights would depend on how the global batch is cut
        return {"next_token": batch["weights"].sum(dtype=torch.float64)}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        if model.head is None:  # a stage before the last
            return []
        loss_sum = model.head.output.loss_sum(state["hidden"], batch["targets"], batch["weights"], self.smoothing)
        return [Term("next_token", loss_sum)]
