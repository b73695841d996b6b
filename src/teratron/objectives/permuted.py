"""Permutation language modelling (XLNet, Yang et al. 2019): some tokens are predicted, in a random order, from all others and those before.

As in the paper's own code, tokens that are not predicted all see each other; what is predicted are runs of whole words.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from teratron.config import Config
from teratron.data.batch import coordinates
from teratron.data.samples import PADDING, Samples
from teratron.data.special import Needs, SpecialTokens
from teratron.models import Model, State
from teratron.objectives.masking import Masking, uniform
from teratron.objectives.terms import Batch, Term

INPUTS = ("tokens", "turns", "positions", "segments", "target_positions", "target_segments")


class Permuted:
    """A share of the tokens of every stretch is predicted; which, and in which order, is drawn for the sample's index."""

    def __init__(self, config: Config) -> None:
        self.seed, self.smoothing, self.isolate = config.train.seed, config.objective.label_smoothing, config.data.isolate_documents
        self.masking = Masking(config.objective, self.seed)
        self.length, self.stretch = config.model.seq_length, config.model.recurrence or config.model.seq_length
        self.predicted = config.objective.most_predicted(self.stretch)
        self.needs = Needs(predicted=self.predicted / self.stretch)

    def prepare(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> Batch:
        """Beside tokens, positions [B, S] and segments, where there are any: `turns` [B, S], from 1 where a token is predicted, else 0;
        `target_positions`, `target_tokens` and `target_weights` [B, P] of what is, in order of place, the weights 0 where a stretch has
        fewer than most.
        """
        rows = samples.rows(index)[:, :-1]  # the last token is the next row's first
        tokens, real = np.maximum(rows, 0), rows != PADDING
        turns = np.stack([self._turns(row, there, sample, special) for row, there, sample in zip(tokens, real, index, strict=True)])
        places = np.stack([np.concatenate(list(self._targets(row))) for row in turns])
        weights, places = places != PADDING, np.maximum(places, 0)
        batch = {"tokens": tokens, "turns": turns, "sample": np.array(index, np.int64), "target_positions": places}
        batch |= coordinates(tokens, real, special.eod, self.isolate)
        batch["target_tokens"] = np.take_along_axis(tokens, places, 1)
        if "segments" in batch:
            batch["target_segments"] = np.take_along_axis(batch["segments"], places, 1)
        return {name: torch.from_numpy(values) for name, values in batch.items()} | {"target_weights": torch.from_numpy(weights).float()}

    def _turns(self, tokens: np.ndarray, real: np.ndarray, sample: int, special: SpecialTokens) -> np.ndarray:
        """Of one sample's tokens; each stretch has an order of its own."""
        joined, able, turns = special.joined(tokens), special.ordinary[tokens] & real, np.zeros(len(tokens), np.int64)
        count = self.length // self.stretch
        for number in range(count):
            here, own = slice(number * self.stretch, (number + 1) * self.stretch), sample * count + number
            if able[here].any():
                chosen = np.flatnonzero(self.masking.chosen(joined[here], able[here], own))
                order = np.argsort(uniform(self.seed, "turn", own, len(chosen)), kind="stable")
                turns[here][chosen[order]] = np.arange(1, len(chosen) + 1)
        return turns

    def _targets(self, turns: np.ndarray) -> Iterator[np.ndarray]:
        """The places of what is predicted, equally many in each stretch, the last ones -1 where there are too few."""
        for start in range(0, self.length, self.stretch):
            found = start + np.flatnonzero(turns[start : start + self.stretch])
            yield np.pad(found, (0, self.predicted - len(found)), constant_values=PADDING)

    def inputs(self, batch: Batch) -> State:
        return {name: batch[name] for name in INPUTS if name in batch}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"permuted": batch["target_weights"].sum(dtype=torch.float64)}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        if model.head is None:  # a stage before the last
            return []
        labels = batch["target_tokens"], batch["target_weights"]
        return [Term("permuted", model.head.output.loss_sum(state["hidden"], *labels, self.smoothing))]
