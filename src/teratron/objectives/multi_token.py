"""The terms of multi-token prediction: beside the next token, each of those after it (Gloeckle et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from teratron.config import Config
from teratron.models import Model, State
from teratron.models.multi_token import AHEAD
from teratron.objectives.terms import Batch, Term


class Ahead:
    """A term `token_2`, `token_3` ... for every token after the next that is predicted, each with a count of its own."""

    def __init__(self, config: Config) -> None:
        self.places = range(2, config.model.predict_tokens + 1)
        self.weight, self.smoothing = config.objective.ahead_weight, config.objective.label_smoothing

    def labels(self, batch: Batch) -> Batch:
        """Targets and weights [B, S] of each term, shifted on whole sequences.

        A token is predicted where all on the way to it are, so never beyond a document whose end is masked, nor beyond the sequence:
        samples are no longer than without these terms, so that their order is the same.
        """
        labels: Batch = {}
        targets, weights = batch["targets"], batch["weights"]
        for place in self.places:
            targets, weights = _next(targets), _next(weights) * batch["weights"]
            labels |= {f"token_{place}_targets": targets, f"token_{place}_weights": weights}
        return labels

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {f"token_{place}": batch[f"token_{place}_weights"].sum(dtype=torch.float64) for place in self.places}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        """Of the last stage."""
        terms = []
        for name, place in ((f"token_{place}", place) for place in self.places):
            labels = batch[f"{name}_targets"], batch[f"{name}_weights"]
            terms.append(Term(name, model.head.output.loss_sum(state[f"{AHEAD}{place}"], *labels, self.smoothing), self.weight))
        return terms


def _next(x_BS: Tensor) -> Tensor:
    """What stands one place on, at the end nothing."""
    return torch.cat([x_BS[:, 1:], torch.zeros_like(x_BS[:, :1])], dim=1)
