"""Masked language modelling (BERT, Devlin et al. 2019; RoBERTa, Liu et al. 2019), and beside it the order or succession of two segments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from teratron.config import Config
from teratron.data.batch import coordinates
from teratron.data.samples import PADDING, Samples
from teratron.data.special import Needs, SpecialTokens
from teratron.models import Model, State
from teratron.objectives.masking import Masking
from teratron.objectives.pairs import Reading, pair, partners, single
from teratron.objectives.terms import Batch, Term


class Masked:
    """Some tokens are hidden and predicted from both sides; the mask of a sample is drawn for its index, so each epoch has another."""

    def __init__(self, config: Config) -> None:
        self.sentence, self.smoothing = config.objective.sentence, config.objective.label_smoothing
        self.length, self.seed = config.model.seq_length, config.train.seed
        self.isolate = config.data.isolate_documents
        self.masking = Masking(config.objective, self.seed)
        frame = 2 if self.sentence == "none" else 3
        self.most = config.objective.most_predicted(self.length)
        self.needs = Needs(self.length - frame, ("mask", "cls", "sep"), self.most / self.length)

    def prepare(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> Batch:
        """Beside the usual: `token_types` [B, S] and, with a sentence objective, `sentence_targets` and `sentence_weights`, the
        latter 0 but at [CLS]. Without one, `weights` are 1 where a token is to be predicted, of which the targets are the originals.
        """
        readings = self._read(samples, index, special)
        ordinary = np.flatnonzero(special.ordinary)
        shape = len(readings), self.length
        tokens, targets, types, chosen = (np.zeros(shape, np.int64) for _ in range(4))
        real = np.zeros(shape, bool)
        for row, (sample, reading) in enumerate(zip(index.tolist(), readings, strict=True)):
            whole = slice(len(reading.tokens))
            maskable = special.ordinary[reading.tokens]
            hidden = self.masking.chosen(special.joined(reading.tokens), maskable, sample)
            tokens[row, whole] = self.masking.corrupted(reading.tokens, hidden, special.ids["mask"], ordinary, sample)
            targets[row, whole], types[row, whole], chosen[row, whole], real[row, whole] = reading.tokens, reading.types, hidden, True
        batch = {"tokens": tokens, "targets": targets, "token_types": types, "sample": np.array(index, np.int64)}
        batch |= coordinates(targets, real, special.eod, self.isolate) | self._labels(readings)
        return {name: torch.from_numpy(values) for name, values in batch.items()} | {"weights": torch.from_numpy(chosen).float()}

    def _read(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> list[Reading]:
        # A raw row also holds the token after its inputs, which is the next one's first.
        rows = [_without_padding(row) for row in samples.rows(index)[:, :-1]]
        if self.sentence == "none":
            return [single(row, special) for row in rows]
        others: Sequence[np.ndarray | None] = [None] * len(rows)
        if self.sentence == "next":
            others = [_without_padding(row) for row in samples.rows(partners(samples, index, self.seed))[:, :-1]]
        return [pair(row, other, special, self.seed, int(sample)) for row, other, sample in zip(rows, others, index, strict=True)]

    def _labels(self, readings: Iterable[Reading]) -> dict[str, np.ndarray]:
        if self.sentence == "none":
            return {}
        labels = [reading.label for reading in readings]
        targets = np.zeros((len(labels), self.length), np.int64)
        weights = np.zeros((len(labels), self.length), np.float32)
        targets[:, 0], weights[:, 0] = [label or 0 for label in labels], [label is not None for label in labels]
        return {"sentence_targets": targets, "sentence_weights": weights}

    def inputs(self, batch: Batch) -> State:
        return {name: batch[name] for name in ("tokens", "token_types", "positions", "segments", "real") if name in batch}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        names = {"masked": "weights"} | ({"sentence": "sentence_weights"} if self.sentence != "none" else {})
        return {term: batch[weights].sum(dtype=torch.float64) for term, weights in names.items()}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        head = model.head
        if head is None:
            return []
        terms = [Term("masked", head.output.loss_sum(state["hidden"], batch["targets"], batch["weights"], self.smoothing, self.most))]
        if self.sentence != "none":
            labels = batch["sentence_targets"], batch["sentence_weights"]
            terms.append(Term("sentence", head.sentence.loss_sum(state["pooled"], *labels, most=1)))
        return terms


def _without_padding(row: np.ndarray) -> np.ndarray:
    return row[row != PADDING]
