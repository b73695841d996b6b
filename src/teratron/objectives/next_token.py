"""Next-token prediction: cross-entropy of each token given those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from teratron.config import UserError
from teratron.models import GPT, State
from teratron.objectives.terms import Batch, Term


class NextToken:
    """Targets are the tokens one place on, shifted before any cut."""

    def inputs(self, batch: Batch) -> State:
        return {name: batch[name] for name in ("tokens", "positions", "segments") if name in batch}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        # float64: a float32 sum of uneven weights would depend on how the global batch is cut
        return {"next_token": batch["weights"].sum(dtype=torch.float64)}

    def terms(self, model: GPT, state: State, batch: Batch) -> list[Term]:
        if model.head is None:
            raise UserError("next_token needs the model's head: this range of units ends before it")
        return [Term("next_token", model.head.output.loss_sum(state["hidden"], batch["targets"], batch["weights"]))]
