"""Reading one sequence and writing another: the frame of span corruption, denoising, prefix language modelling and their mixture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from teratron.config import Config, UserError
from teratron.data.samples import PADDING, Samples
from teratron.data.special import Needs, SpecialTokens
from teratron.models import Model, State
from teratron.objectives.corruption import Draw, Pair
from teratron.objectives.masking import uniform
from teratron.objectives.terms import Batch, Term

START, END = "pad", "sep"
"""Roles of the token that a decoder begins with, as T5 has it, and of the one that ends what is read and what is written."""


@dataclass(frozen=True)
class Sizes:
    """Tokens, their ends included."""

    read: int
    written: int


class Rewriting:
    """An encoder reads and a decoder writes; a decoder alone has both in one sequence, of which all of it sees what was read."""

    name: str
    ends = True
    """Whether what is read and what is written end with a token of their own."""

    def __init__(self, config: Config) -> None:
        self.smoothing, self.seed = config.objective.label_smoothing, config.train.seed
        self.alone, self.length = config.model.family == "gpt", config.model.seq_length
        raw = max(itertools.takewhile(self.fits, itertools.count(2)), default=0)
        if not raw:
            raise UserError(f"model.seq_length = {self.length} is too short for objective.name = {self.name}: choose at least 16")
        self.written = max(sizes.written for sizes in self.sizes(raw))
        roles = (*self.roles(raw), *((END,) if self.ends else ()), *(() if self.alone else (START,)))
        self.needs = Needs(raw - 1, roles, self.written / self.length)

    def sizes(self, raw: int) -> Sequence[Sizes]:
        """The most that is read and written of a raw row of so many tokens, in each way in which it may be rewritten."""
        raise NotImplementedError

    def roles(self, raw: int) -> Sequence[str]:
        """Tokens that this takes beside those of the frame."""
        return ()

    def pair(self, tokens: np.ndarray, special: SpecialTokens, draw: Draw) -> Pair:
        """What is read of a row of at least 2 tokens, and what is to be written, without their ends."""
        raise NotImplementedError

    def fits(self, raw: int) -> bool:
        """Whether the model has room for what a raw row becomes."""
        if self.alone:
            return all(sizes.read + sizes.written - 1 <= self.length for sizes in self.sizes(raw))
        return all(max(sizes.read, sizes.written) <= self.length for sizes in self.sizes(raw))

    def prepare(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> Batch:
        """Beside the usual, with an encoder: `encoder_tokens`, `encoder_positions` [B, S], and where there is padding
        `encoder_segments`, -1 there; tensors of the decoder are [B, T]. Without one: `prefix`, bool [B, S], True at what is read.
        """
        rows = [row[row != PADDING] for row in samples.rows(index)]
        pairs = [self._whole_pair(row, special, sample) for row, sample in zip(rows, index.tolist(), strict=True)]
        if self.alone:
            batch = one_behind_the_other(pairs, self.length)
        else:
            batch = side_by_side(pairs, self.length, self.written, special.ids[START])
        return {name: torch.from_numpy(values) for name, values in batch.items()} | {"sample": torch.from_numpy(np.array(index, np.int64))}

    def _whole_pair(self, tokens: np.ndarray, special: SpecialTokens, sample: int) -> Pair:
        draw = partial(_drawn, self.seed, sample)
        read, written = self.pair(tokens, special, draw) if len(tokens) > 1 else (tokens, tokens[:0])
        if not self.ends:
            return read, written
        end = [special.ids[END]]
        return np.concatenate((read, end)), np.concatenate((written, end))

    def inputs(self, batch: Batch) -> State:
        return {name: tensor for name, tensor in batch.items() if name not in ("targets", "weights", "sample")}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {self.name: batch["weights"].sum(dtype=torch.float64)}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        if model.head is None:  # a stage before the last
            return []
        targets = batch["targets"], batch["weights"]
        return [Term(self.name, model.head.output.loss_sum(state["hidden"], *targets, self.smoothing, self.written))]


def side_by_side(pairs: Sequence[Pair], read: int, written: int, start: int) -> dict[str, np.ndarray]:
    """A batch for an encoder and a decoder, which is given what it has written so far."""
    inputs, real = padded([pair[0] for pair in pairs], read)
    targets, weights = padded([pair[1] for pair in pairs], written)
    tokens = np.concatenate((np.full((len(pairs), 1), start), targets[:, :-1]), axis=1)
    batch = {"encoder_tokens": inputs, "encoder_positions": _places(inputs), "tokens": tokens, "positions": _places(tokens)}
    batch |= {"targets": targets, "weights": weights.astype(np.float32)}
    return batch if real.all() else batch | {"encoder_segments": real.astype(np.int64) - 1}


def one_behind_the_other(pairs: Sequence[Pair], length: int) -> dict[str, np.ndarray]:
    """A batch for a decoder alone, which writes behind what it has read."""
    rows, real = padded([np.concatenate(pair) for pair in pairs], length + 1)
    tokens, place = rows[:, :-1], np.arange(length)
    read = np.array([len(pair[0]) for pair in pairs])[:, None]
    weights = real[:, 1:] & (place + 1 >= read)
    batch = {"tokens": tokens, "positions": _places(tokens), "prefix": np.broadcast_to(place < read, tokens.shape).copy()}
    return batch | {"targets": rows[:, 1:], "weights": weights.astype(np.float32)}


def padded(sequences: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as rows of one length, int64 [B, S], and which of it is no padding, bool [B, S]."""
    rows, real = np.zeros((len(sequences), length), np.int64), np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        rows[row, : len(sequence)], real[row, : len(sequence)] = sequence, True
    return rows, real


def _places(tokens: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))


def _drawn(seed: int, sample: int, name: str, count: int) -> np.ndarray:
    return uniform(seed, name, sample, count)
