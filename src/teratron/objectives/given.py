"""Learning from examples made ahead (`data.examples`): the answer (supervised) or the class of tokens (classes)."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import Config
from teratron.data.examples import Examples
from teratron.data.samples import Samples
from teratron.data.special import Needs, SpecialTokens
from teratron.models import Model, State
from teratron.models.leaves import accurate
from teratron.objectives.terms import Batch, Term

ENTER = ("tokens", "token_types", "positions", "segments", "real", "prefix", "turns")
"""What enters the model, of the decoder's stream and, as `encoder_tokens`, ..., of the encoder's."""


class Given:
    """The base: batches are examples as they were written; tensors are [B, S]."""

    needs = Needs()
    name: str

    def __init__(self, config: Config) -> None:
        self.smoothing = config.objective.label_smoothing
        self.two_streams = config.model.family == "xlnet"
        self.both_ways = "encoder_" if config.model.family == "encoder_decoder" else "" if config.model.family != "gpt" else None
        """The stream whose attention looks both ways, so that padding must be hidden from it."""

    def prepare(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> Batch:
        batch = cast(Examples, samples).take(index)
        if self.both_ways is not None and f"{self.both_ways}real" in batch:
            batch[f"{self.both_ways}segments"] = batch.pop(f"{self.both_ways}real").long() - 1
        return batch | {"turns": torch.zeros_like(batch["tokens"])} if self.two_streams else batch  # all tokens are given

    def inputs(self, batch: Batch) -> State:
        return {name: tensor for name, tensor in batch.items() if name.removeprefix("encoder_") in ENTER}

    def weight(self, batch: Batch) -> Tensor:
        """What the terms are divided by, a float64 scalar."""
        return batch["weights"].sum(dtype=torch.float64)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys((self.name, "accuracy"), self.weight(batch))

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        if model.head is None:  # a stage before the last
            return []
        loss, right = self.measured(model, state, batch)
        return [Term(self.name, loss), Term("accuracy", right, 0.0)]

    def measured(self, model: Model, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and the weight of what is right."""
        raise NotImplementedError


class Supervised(Given):
    """Cross-entropy of the tokens of an answer; with a decoder alone those behind the question, which may be seen from both sides."""

    name = "supervised"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {self.name: self.weight(batch)}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        if model.head is None:
            return []
        targets = batch["targets"], batch["weights"]
        return [Term(self.name, model.head.output.loss_sum(state["hidden"], *targets, self.smoothing))]


class Classes(Given):
    """Cross-entropy of the class of each token that weighs anything: of one a sequence, or of the first piece of each word."""

    name = "classes"

    def measured(self, model: Model, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        join, scores = model.head.join, model.head.scores(state)
        scores = scores.to(accurate(scores.dtype))
        targets, weights = (join.share(batch[name]) for name in ("targets", "weights"))
        losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=self.smoothing)
        right = (scores.argmax(-1) == targets) * weights
        return join.total((losses * weights.flatten()).sum()), join.total(right.sum())


class Pooled(Given):
    """Cross-entropy of one class a sequence, read from the mean of its tokens: `pool_weights` [B, S] sum to 1 over each.

    Small encoders whose first token has learnt nothing of the rest have their knowledge there (Reimers and Gurevych 2019). `targets` and
    `weights` are those of each sequence's first token.
    """

    name = "pooled"

    def weight(self, batch: Batch) -> Tensor:
        return batch["weights"][:, 0].sum(dtype=torch.float64)

    def measured(self, model: Model, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        scores, targets, weights = pooled_scores(model, state, batch), batch["targets"][:, 0], batch["weights"][:, 0]
        losses = F.cross_entropy(scores, targets, reduction="none", label_smoothing=self.smoothing)
        return (losses * weights).sum(), ((scores.argmax(-1) == targets) * weights).sum()


def pooled_scores(model: Model, state: State, batch: Batch) -> Tensor:
    """Scores of the mean of each sequence's tokens, [B, C]: the mean of their scores, as these are linear."""
    scores: Tensor = model.head.scores(state)
    weights = model.head.join.share(batch["pool_weights"])
    total: Tensor = model.head.join.total((scores.to(accurate(scores.dtype)) * weights.unsqueeze(-1).to(accurate(scores.dtype))).sum(1))
    return total
