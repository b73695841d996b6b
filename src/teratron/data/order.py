"""The order in which samples are visited: Megatron-LM's shuffled indices exactly, and keyed permutations computed at any point."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np

from teratron.config import UserError

GOLDEN = 0x9E3779B97F4A7C15
CHUNK = 1 << 16
"""Samples located at once: the part of the document starts that they lie in stays in the processor's cache."""


@dataclass(frozen=True)
class MegatronOrder:
    """What Megatron-LM's GPTDataset caches as three .npy files, for N samples over E epochs of M documents.

    `document_index` int32 [E * M]: the documents in shuffled order; `sample_index` [N + 1, 2]: (place in document_index, token offset)
    at which sample k begins and sample k - 1 ends; `shuffle_index` uint32 or int64 [N]: item i is sample shuffle_index[i].
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray


def megatron_order(lengths: np.ndarray, index: range, samples: int | None, seq_length: int, seed: int, extra: int = 1) -> MegatronOrder:
    """The order of Megatron-LM's GPTDataset, number for number.

    Args: `lengths` [S] in tokens of all sequences of the dataset; `index`, those of them that are used; `samples` asked for
    (None = one epoch; the order holds as many as whole epochs give); `extra` tokens that neighbouring samples share
    (1: the last target of a sample is the first input of the next).
    Raises `UserError` when there are too few tokens for one sample, or the seed is not below 2**32.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"train.seed = {seed}: data.order = megatron takes seeds below {2**32}: choose a smaller one")
    per_epoch = int(lengths[index.start : index.stop].sum(dtype=np.int64))
    if not per_epoch or (samples is None and per_epoch < seq_length + extra):
        raise UserError(
            f"{len(index)} documents hold {per_epoch} tokens; model.seq_length = {seq_length} needs {seq_length + extra}: add data"
        )
    epochs = 1 if samples is None else max(1, -(-(samples * seq_length + extra) // per_epoch))
    count = (epochs * per_epoch - extra) // seq_length
    # A last epoch of which less than 80 % is used is shuffled apart: mixed with the others, it would leave gaps in whole epochs.
    without_last = ((epochs - 1) * per_epoch - extra) // seq_length
    apart = epochs > 1 and samples is not None and samples - without_last < int(0.80 * ((per_epoch - extra) // seq_length))
    random = np.random.RandomState(seed)
    documents = np.tile(np.arange(index.start, index.stop, dtype=np.int32), epochs)
    _shuffle_parts(documents, len(index) * (epochs - 1) if apart else 0, random)
    sample_index = _sample_index(lengths[documents], count, seq_length, extra)
    shuffle_index = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
    _shuffle_parts(shuffle_index, without_last if apart else 0, random)
    return MegatronOrder(documents, sample_index, shuffle_index)


def _shuffle_parts(values: np.ndarray, cut: int, random: np.random.RandomState) -> None:
    """Shuffle values[:cut] and then values[cut:] in place."""
    if cut:
        random.shuffle(values[:cut])
    random.shuffle(values[cut:])


def _sample_index(lengths: np.ndarray, count: int, seq_length: int, extra: int) -> np.ndarray:
    """Where samples 0 to `count` begin, [count + 1, 2]: (document, offset) of flat token k * seq_length; `lengths` in document order.

    With extra = 0 a sample that begins where a document does is located at the end of the one before it, as Megatron does.
    """
    starts = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
    dtype = np.int32 if max(len(lengths), int(lengths.max())) <= 2**31 - 1 else np.int64
    rows = np.empty((count + 1, 2), dtype)
    for first in range(0, count + 1, CHUNK):
        begin = np.arange(first, min(first + CHUNK, count + 1)) * seq_length
        token = np.maximum(begin + extra - 1, 0)
        low, high = np.searchsorted(starts, token[[0, -1]], "right")
        document = low - 1 + np.searchsorted(starts[low:high], token, "right")
        rows[first : first + len(begin), 0] = document
        rows[first : first + len(begin), 1] = begin - starts[document]
    rows[0] = 0  # also where the first document is empty
    return rows


def parse_split(split: str) -> list[float]:
    """The one to three shares, of training, validation and test, that a text such as "98,2,0" gives."""
    try:
        shares = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or sum(shares) == 0:
        raise UserError(f"data.split = '{split}': expected one to three shares, of training, validation and test, such as '98,2,0'")
    return shares


def split_documents(split: str, count: int) -> list[range | None]:
    """Cut `count` documents into training, validation and test by shares such as "98,2,0", rounding as Megatron-LM does.

    Missing shares are zero; a part without documents is None.
    """
    shares = parse_split(split)
    normal = np.array([*shares, 0.0, 0.0][:3])
    normal = normal / normal.sum()
    bounds = [0.0]
    for share in normal.tolist():
        bounds.append(bounds[-1] + share)
    # Python's round, to even, is part of the format: it decides where a document at exactly one half goes.
    edges = [round(bound * float(count)) for bound in bounds]
    return [range(a, b) if b > a else None for a, b in itertools.pairwise(edges)]


def permute(index: np.ndarray, count: int, seed: int, *salts: int | np.ndarray) -> np.ndarray:
    """A random-looking permutation of [0, count) evaluated at `index`, int64 of its shape, in memory O(index).

    Every (seed, *salts) is another permutation; a salt may be an array [of index's shape], one permutation for each element.
    A Feistel network over the next power of two, walked along its cycle back into the range (Black and Rogaway 2002).
    Raises `IndexError` outside [0, count); count is at most 2**62.
    """
    value = np.array(index, np.int64).ravel()
    if value.size and not (value.min() >= 0 and value.max() < count):
        raise IndexError(f"index {value.min()} to {value.max()} is outside [0, {count})")
    bits = max(2, (count - 1).bit_length())
    keys = np.broadcast_to(keyed(seed, *(np.ravel(salt) for salt in salts)), value.shape)
    result = _feistel(value.astype(np.uint64), keys, bits)
    outside = np.flatnonzero(result >= count)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[outside], bits)
        outside = outside[result[outside] >= count]
    return result.astype(np.int64).reshape(np.shape(index))


def keyed(seed: int, *salts: int | np.ndarray) -> np.ndarray:
    """Uniform 64-bit numbers, one for each element of the broadcast salts (at least one element); a pure function of all of them."""
    key = _mix(np.array([(seed + GOLDEN) % 2**64], np.uint64))
    for salt in salts:
        key = _mix(key + (np.atleast_1d(np.asarray(salt).astype(np.uint64)) + np.uint64(1)) * np.uint64(GOLDEN))
    return key


def _feistel(value: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A keyed bijection of [0, 2**bits), bits >= 2."""
    low_bits = bits // 2
    high, low = value >> np.uint64(low_bits), value & np.uint64((1 << low_bits) - 1)
    # Measured over 200,000 keys: at 5 items 12 rounds still leave a bias, 16 leave a trace, 24 none; from 33 items on 6 leave none.
    for number in range(24 if bits < 8 else 8):
        source, width = (high, low_bits) if number % 2 else (low, bits - low_bits)
        change = _mix(keys + source + np.uint64(number * GOLDEN % 2**64)) >> np.uint64(64 - width)
        if number % 2:
            low = low ^ change
        else:
            high = high ^ change
    return high << np.uint64(low_bits) | low


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): each bit of the result depends on every bit of uint64 `value`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
