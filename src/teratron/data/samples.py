"""Samples: sample i, a row of token ids, as a pure function of (data, seed, i); every order, blend and phase has one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from teratron.config import UserError
from teratron.data.blend import megatron_blend, native_blend
from teratron.data.indexed import IndexedDataset
from teratron.data.order import keyed, megatron_order, permute

PADDING = -1
"""Stands where a row has no token."""

Place = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Sample indices [n] -> (which part, index within that part), both [n]."""


class Samples(Protocol):
    """Rows by global sample index; the same index gives the same row in any process, at any time."""

    @property
    def seq_length(self) -> int:
        """Inputs of a row; it also holds the last target, so that it is one token longer."""

    @property
    def count(self) -> int | None:
        """How many samples there are; None = without end."""

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Token ids int64 [n, seq_length + 1] of samples `index` [n], -1 for padding. Raises `IndexError` outside [0, count)."""


class NativeSamples:
    """Windows of the token stream [start_token, stop_token), epoch after epoch without end; nothing is stored.

    In each epoch the windows touch without overlap (the last target of one is the first input of the next). Where the first one
    starts and in which order they come is keyed by (seed, epoch). Fewer than 2 * seq_length tokens, before the first window or
    after the last, are left out of an epoch; not the same ones in the next.
    """

    count: int | None = None

    def __init__(self, dataset: IndexedDataset, start_token: int, stop_token: int, seq_length: int, seed: int) -> None:
        tokens = stop_token - start_token
        if tokens < seq_length + 1:
            raise UserError(
                f"{dataset.prefix}: {tokens} tokens in this part, a sample of model.seq_length = {seq_length} needs {seq_length + 1}: "
                "add data, change data.split, or lower model.seq_length"
            )
        self.seq_length = seq_length
        self.per_epoch = max(1, (tokens - seq_length) // seq_length)
        """Samples of one epoch."""
        self._offsets = tokens - self.per_epoch * seq_length
        self._start, self._seed, self._tokens = start_token, seed, dataset.tokens

    def rows(self, index: np.ndarray) -> np.ndarray:
        _check(index, self.count)
        epoch, place = np.divmod(index, self.per_epoch)
        window = permute(place, self.per_epoch, self._seed, epoch)
        offset = (keyed(self._seed, epoch, 1) % np.uint64(self._offsets)).astype(np.int64)
        return _gather(self._tokens, self._start + offset + window * self.seq_length, self.seq_length + 1)


class Windows:
    """The token stream [start_token, stop_token) once, for evaluation: each token after the first is a target exactly once.

    Neighbouring windows share one token; the last is padded. `target_tokens` is the number of targets in all of them.
    """

    def __init__(self, dataset: IndexedDataset, start_token: int, stop_token: int, seq_length: int) -> None:
        if stop_token - start_token < 2:
            raise UserError(
                f"{dataset.prefix}: {stop_token - start_token} tokens to evaluate on, at least 2 are needed: give more validation data"
            )
        self.seq_length = seq_length
        self.target_tokens = stop_token - start_token - 1
        self.count = -(-self.target_tokens // seq_length)
        self._start, self._stop, self._tokens = start_token, stop_token, dataset.tokens

    def rows(self, index: np.ndarray) -> np.ndarray:
        _check(index, self.count)
        begin, width = self._start + np.asarray(index) * self.seq_length, self.seq_length + 1
        rows = np.full((len(begin), width), PADDING, np.int64)
        whole = begin + width <= self._stop
        if whole.any():
            rows[whole] = _gather(self._tokens, begin[whole], width)
        if not whole.all():
            rest = self._tokens[self._start + (self.count - 1) * self.seq_length : self._stop]
            rows[~whole, : len(rest)] = rest
        return rows


class MegatronSamples:
    """The samples of Megatron-LM's GPTDataset in its order: shuffled documents, laid end to end, cut, and shuffled again.

    `documents` are those of one part of `split_documents`, counted in sequences of the dataset as Megatron-LM counts;
    `samples` is how many will be drawn (None = one epoch), which decides the whole order.
    Memory: 12 bytes a sample, and 4 for each document and epoch.
    """

    def __init__(self, dataset: IndexedDataset, documents: range, samples: int | None, seq_length: int, seed: int) -> None:
        self.seq_length = seq_length
        self._dataset = dataset
        self._order = megatron_order(dataset.lengths, documents, samples, seq_length, seed)
        self.count = len(self._order.shuffle_index)

    def rows(self, index: np.ndarray) -> np.ndarray:
        _check(index, self.count)
        sample = self._order.shuffle_index[index].astype(np.int64)
        (first, begin), (last, end) = (self._order.sample_index[sample + k].astype(np.int64).T for k in (0, 1))
        # A row is made of pieces, one for each document that it touches: the tail of the first, whole ones, the head of the last.
        pieces = last - first + 1
        heads = np.cumsum(pieces) - pieces
        document = self._order.document_index[_ramps(first, pieces)]
        starts, lengths = self._dataset.starts[document], self._dataset.lengths[document].astype(np.int64)
        lengths[heads + pieces - 1] = end + 1
        starts[heads] += begin
        lengths[heads] -= begin
        return self._dataset.tokens[_ramps(starts, lengths)].astype(np.int64).reshape(len(sample), self.seq_length + 1)


class BlendedSamples:
    """Several sources mixed: `place` says which of `parts` gives each sample, and which of its samples."""

    def __init__(self, parts: Sequence[Samples], place: Place, count: int | None) -> None:
        self.seq_length = parts[0].seq_length
        self.count = count
        self._parts, self._place = parts, place

    @classmethod
    def native(cls, parts: Sequence[Samples], weights: Sequence[float], seed: int) -> BlendedSamples:
        """An endless blend of endless parts by weight (`native_blend`)."""
        return cls(parts, lambda index: native_blend(index, weights, seed), None)

    @classmethod
    def megatron(cls, parts: Sequence[Samples], weights: Sequence[float] | np.ndarray, size: int) -> BlendedSamples:
        """Megatron-LM's blend of `size` samples (`megatron_blend`); raises `UserError` when a part has too few."""
        dataset, within = megatron_blend(weights, size)
        for number, (part, need) in enumerate(zip(parts, np.bincount(dataset, minlength=len(parts)), strict=True)):
            if part.count is not None and part.count < need:
                raise UserError(f"dataset {number} of the blend has {part.count} samples, its weight needs {need}: lower its weight")
        return cls(parts, lambda index: (dataset[index], within[index]), size)

    def rows(self, index: np.ndarray) -> np.ndarray:
        _check(index, self.count)
        return _distribute(self._parts, self.seq_length, *self._place(np.asarray(index)))


class PhasedSamples:
    """Sources one after another: the first `count` samples from the first, and so on (contract C14).

    A run that is lengthened appends a phase, so that what it has seen, and what it would have seen, stays the same.
    """

    def __init__(self, phases: Sequence[tuple[int, Samples]]) -> None:
        for count, part in phases:
            if part.count is not None and part.count < count:
                raise ValueError(f"a phase of {count} samples from a source of {part.count}")
        self.seq_length = phases[0][1].seq_length
        self._ends = np.cumsum([count for count, _ in phases])
        self._parts = [part for _, part in phases]
        self.count = int(self._ends[-1])

    def rows(self, index: np.ndarray) -> np.ndarray:
        _check(index, self.count)
        phase = np.searchsorted(self._ends, index, "right")
        begins = np.concatenate(([0], self._ends))
        return _distribute(self._parts, self.seq_length, phase, np.asarray(index) - begins[phase])


class KnownTokens:
    """Samples whose every row is compared with the vocabulary when it is read; raises `UserError` for a token beyond it."""

    def __init__(self, samples: Samples, vocab_size: int) -> None:
        self.seq_length, self.count = samples.seq_length, samples.count
        self._samples, self._vocab_size = samples, vocab_size

    def rows(self, index: np.ndarray) -> np.ndarray:
        rows = self._samples.rows(index)
        if rows.size and rows.max() >= self._vocab_size:
            raise UserError(
                f"the data holds token {rows.max()}, model.vocab_size is {self._vocab_size}: "
                "set it to the size of the tokenizer that prepared the data, or prepare the data again"
            )
        return rows


def _check(index: np.ndarray, count: int | None) -> None:
    if np.size(index) and (np.min(index) < 0 or (count is not None and np.max(index) >= count)):
        raise IndexError(
            f"sample {np.min(index)} to {np.max(index)} asked for, there are {'endless' if count is None else count} from 0 on"
        )


def _distribute(parts: Sequence[Samples], seq_length: int, part: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Rows [n, seq_length + 1] where row k is sample within[k] of parts[part[k]]."""
    rows = np.empty((len(part), seq_length + 1), np.int64)
    for number in np.unique(part):
        mine = part == number
        rows[mine] = parts[number].rows(within[mine])
    return rows


def _gather(tokens: np.ndarray, begin: np.ndarray, width: int) -> np.ndarray:
    """tokens[b : b + width] for every b in begin [n], int64 [n, width]; copies whole rows and reads no other page of the file."""
    return sliding_window_view(tokens, width)[begin].astype(np.int64)


def _ramps(begin: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers begin[k], begin[k] + 1, ... lengths[k] of them, for all k one after another."""
    heads = np.cumsum(lengths) - lengths
    return np.repeat(begin - heads, lengths) + np.arange(lengths.sum())
