"""Losses that compare the tokens or segments of one example: the right place (pointing), pairs (similar), two answers (preferred)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import Config
from teratron.models import Model, State
from teratron.models.leaves import accurate
from teratron.objectives.given import Given
from teratron.objectives.terms import Batch

PLACES = ("first_weights", "second_weights")
"""Which token is the right one, for each kind of place."""


class Pointing(Given):
    """Which token is meant, among `candidates`: where an answer begins and where it ends, or which choice is right.

    `first_weights`, and with two classes `second_weights`, [B, S], are 1 at the right token and elsewhere 0; each row counts once.
    """

    name = "pointing"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.places = PLACES[: config.model.classes]

    def weight(self, batch: Batch) -> Tensor:
        return batch[PLACES[0]].sum(dtype=torch.float64)

    def measured(self, model: Model, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        scores = pointed(model, state, batch["candidates"])
        right = torch.stack([batch[name] for name in self.places], dim=-1).to(scores.dtype)  # [B, S, kinds]
        losses = -(right * scores.log_softmax(1).clamp(min=-1e4)).sum(1)
        hits = right.gather(1, scores.argmax(1, keepdim=True))[:, 0].amin(-1)
        return losses.mean(-1).sum(), hits.sum()


def pointed(model: Model, state: State, candidates_BS: Tensor) -> Tensor:
    """Scores of all tokens for each kind of place, [B, S, kinds]; minus infinity where a token is no candidate."""
    scores = model.head.join.every(model.head.scores(state))
    return scores.to(accurate(scores.dtype)).masked_fill(candidates_BS.unsqueeze(-1) == 0, -math.inf)


class Similar(Given):
    """Segments 2i and 2i + 1 of an example belong together, and each is to find the other among those of the example.

    InfoNCE both ways over cosines divided by a temperature (Gao et al. 2021); an example is the group of in-batch negatives, so that
    nothing depends on how batches are cut. `vector_weights` [B, S] weigh the tokens whose mean is a segment's vector.
    """

    name = "similar"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.temperature = config.objective.temperature

    def weight(self, batch: Batch) -> Tensor:
        return pair_weights(batch).sum(dtype=torch.float64)

    def measured(self, model: Model, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        vectors, there = vectors_of(model, state, batch), pair_weights(batch).bool()
        cosines = vectors[:, ::2] @ vectors[:, 1::2].mT / self.temperature  # [B, pairs, pairs]
        there = there[:, : cosines.shape[1]]
        losses = cosines.new_zeros(())
        for scores in (cosines, cosines.mT):
            scores = scores.masked_fill(~there.unsqueeze(1), -1e4)
            losses = losses - (scores.log_softmax(-1).diagonal(dim1=1, dim2=2) * there).sum() / 2
        best = cosines.masked_fill(~there.unsqueeze(1), -math.inf).argmax(-1)
        right = (best == torch.arange(best.shape[1], device=best.device)) & there
        return losses, right.sum()


def pair_weights(batch: Batch) -> Tensor:
    """1 for each pair of an example of which both segments are there, [B, pairs]."""
    sums = per_segment(batch["vector_weights"].double(), batch["segments"], most_segments(batch["segments"]))
    return ((sums[:, ::2] > 0) & (sums[:, 1::2] > 0)).double()


def vectors_of(model: Model, state: State, batch: Batch) -> Tensor:
    """Unit vectors of an example's segments, [B, segments, H]; zeros where there is none."""
    join, hidden = model.head.join, state["hidden"]
    hidden, count = hidden.to(accurate(hidden.dtype)), most_segments(batch["segments"])
    weights, segments = (join.share(batch[name]) for name in ("vector_weights", "segments"))
    sums = per_segment(hidden * weights.unsqueeze(-1).to(hidden.dtype), segments, count)
    return F.normalize(join.total(sums), dim=-1)


def most_segments(segments_BS: Tensor) -> int:
    """Segments of the example that has most, an even number."""
    return (int(segments_BS.max()) + 2) // 2 * 2


def per_segment(x_BSH: Tensor, segments_BS: Tensor, count: int) -> Tensor:
    """Sums over each segment's tokens, [B, count, ...]; -1 is padding."""
    index = (segments_BS + 1).view(*segments_BS.shape, *[1] * (x_BSH.dim() - 2)).expand_as(x_BSH)
    return x_BSH.new_zeros(x_BSH.shape[0], count + 1, *x_BSH.shape[2:]).scatter_add(1, index, x_BSH)[:, 1:]


class Preferred(Given):
    """Segment 0 of an example is to be likelier than segment 1, against a reference (DPO, Rafailov et al. 2023).

    `weights` are 1 at the tokens of the answers; `references` [B, S] sum to the reference's log-probability over each segment.
    """

    name = "preferred"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.beta = config.objective.beta

    def weight(self, batch: Batch) -> Tensor:
        return (per_segment(batch["weights"].double(), batch["segments"], 2) > 0).all(1).sum(dtype=torch.float64)

    def measured(self, model: Model, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss is no sum over tokens, but its slope in each is known once the sums are: a pass without gradient finds them."""
        weights, segments = batch["weights"], batch["segments"]
        there = (per_segment(weights, segments, 2) > 0).all(1)
        with torch.no_grad():
            found = answer_scores(model, state["hidden"], batch)
            margins = self.beta * (found - per_segment(batch["references"].to(found.dtype), segments, 2)) @ found.new_tensor([1.0, -1.0])
            slopes = -self.beta * torch.sigmoid(-margins) * there  # of the loss, in the first answer's log-probability
        signs = (segments == 0).to(slopes.dtype) - (segments == 1).to(slopes.dtype)
        surrogate = model.head.output.loss_sum(state["hidden"], batch["targets"], -slopes.unsqueeze(-1) * signs * weights)
        value = (-F.logsigmoid(margins) * there).sum()
        return value + (surrogate - surrogate.detach()), ((margins > 0) & there).sum()


def answer_scores(model: Model, hidden_BSH: Tensor, batch: Batch) -> Tensor:
    """Log-probabilities of the weighed tokens of each row's segments 0 and 1, [B, 2]."""
    scores = []
    for row in range(len(batch["weights"])):
        own = slice(row, row + 1)
        for segment in (0, 1):
            chosen = batch["weights"][own] * (batch["segments"][own] == segment)
            scores.append(-model.head.output.loss_sum(hidden_BSH[own], batch["targets"][own], chosen))
    return torch.stack(scores).view(-1, 2)
