"""Corruptions: of a run of tokens, what is read and what is to be written. Pure functions of the tokens and of drawn numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

Draw = Callable[[str, int], np.ndarray]
"""Name and count -> so many numbers from [0, 1)."""
Pair = tuple[np.ndarray, np.ndarray]
"""What is read, and what is to be written, int64 [n] each."""


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many of `length` tokens, at least 2, are noise, and in how many spans; both at least 1, and no span touches another."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def span_corruption(tokens: np.ndarray, density: float, mean_span: float, sentinels: np.ndarray, draw: Draw) -> Pair:
    """T5's (Raffel et al. 2020): spans are read as sentinels, one each, behind which they are to be written.

    tokens: at least 2. Noise and what is kept take turns, beginning with what is kept; the lengths of each are a random
    composition of their sum.
    """
    noise, spans = span_counts(len(tokens), density, mean_span)
    kept, lost = random_parts(len(tokens) - noise, spans, draw("kept", len(tokens))), random_parts(noise, spans, draw("lost", len(tokens)))
    hidden = np.repeat(np.tile([False, True], spans), np.stack([kept, lost], axis=1).ravel())
    return collapsed(tokens, hidden, sentinels), collapsed(tokens, ~hidden, sentinels)


def random_parts(total: int, count: int, drawn: np.ndarray) -> np.ndarray:
    """`count` lengths of at least 1 that add up to `total`, all compositions alike likely."""
    cuts = 1 + np.sort(np.argsort(drawn[: total - 1], kind="stable")[: count - 1])
    return np.diff(np.concatenate(([0], cuts, [total])))


def collapsed(tokens: np.ndarray, hidden: np.ndarray, stand_ins: np.ndarray) -> np.ndarray:
    """The tokens with each run of hidden ones in one stand-in, these taken in order."""
    begins = hidden & ~np.concatenate(([False], hidden[:-1]))
    result = tokens.copy()
    result[begins] = stand_ins[: np.count_nonzero(begins)]
    return result[begins | ~hidden]


def infilling(tokens: np.ndarray, density: float, mean_span: float, mask: int, draw: Draw) -> np.ndarray:
    """BART's text infilling (Lewis et al. 2020): spans of Poisson lengths become one mask each; one of length 0 is a mask put in.

    Never longer than `tokens`.
    """
    most = math.ceil(density * len(tokens))
    lengths = poisson(mean_span, draw("length", most))
    lengths = lengths[: 1 + int(np.searchsorted(np.cumsum(lengths), most))]
    lengths = np.diff(np.minimum(np.cumsum(lengths), most), prepend=0)
    taken, spans = int(lengths.sum()), np.count_nonzero(lengths)
    lengths = lengths[(lengths > 0) | (np.cumsum(lengths == 0) <= taken - spans)] if spans else np.ones(1, np.int64)
    units = np.ones(len(tokens) - int(lengths.sum()) + len(lengths), np.int64)
    places = np.sort(np.argsort(draw("place", len(units)), kind="stable")[: len(lengths)])
    units[places] = lengths
    begins = np.cumsum(units) - units
    read = tokens[np.minimum(begins, len(tokens) - 1)]
    read[places] = mask
    return read


def poisson(mean: float, drawn: np.ndarray) -> np.ndarray:
    """Poisson numbers by their cumulative distribution."""
    shares = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(math.ceil(mean + 12 * math.sqrt(mean)) + 12)]
    return np.searchsorted(np.cumsum(shares), drawn, "right")


def thinned(tokens: np.ndarray, density: float, how: Literal["masking", "deletion"], mask: int, draw: Draw) -> np.ndarray:
    """Single tokens masked or deleted, at least one of them, and of those that are deleted not all."""
    count = max(1, min(round(density * len(tokens)), len(tokens) - 1))
    chosen = np.argsort(draw("place", len(tokens)), kind="stable")[:count]
    if how == "deletion":
        return np.delete(tokens, chosen) if len(tokens) > 1 else tokens
    read = tokens.copy()
    read[chosen] = mask
    return read


def permuted(tokens: np.ndarray, ends: np.ndarray, draw: Draw) -> np.ndarray:
    """Sentences in random order; ends [n]: whether a token ends one."""
    sentences = np.split(tokens, np.flatnonzero(ends[:-1]) + 1)
    order = np.argsort(draw("order", len(sentences)), kind="stable")
    return np.concatenate([sentences[number] for number in order])
