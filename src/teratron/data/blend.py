"""Blends: which dataset, and which sample of it, stands at each place when several are mixed by weight."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teratron.config import UserError
from teratron.data.order import keyed

SURPLUS = 0.005
"""Share of samples that Megatron-LM asks of each dataset beyond its part (`mid_level_dataset_surplus`)."""


def parse_blend(items: Sequence[str]) -> list[tuple[float | None, Path]]:
    """Read `weight prefix weight prefix ...` or `prefix prefix ...` into (weight or None, prefix) pairs.

    Megatron-LM's rule: an even count of items with a number at every even place is weighted; anything else is prefixes alone.
    Raises `UserError` for no items at all, and for weights that are negative, not finite or all zero.
    """
    if not items:
        raise UserError("data.train is empty: give the prefix of a prepared dataset, or raw text as data.text")
    try:
        weights = [float(item) for item in items[::2]]
    except ValueError:
        weights = []
    if len(items) % 2 or not weights:
        return [(None, Path(item)) for item in items]
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UserError(f"blend weights {' '.join(items[::2])}: expected numbers of at least 0, one of them above 0")
    return [(weight, Path(item)) for weight, item in zip(weights, items[1::2], strict=True)]


def normalized(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weights divided by their sum, float64."""
    values = np.asarray(weights, np.float64)
    return values / values.sum()


def native_blend(index: np.ndarray, weights: Sequence[float] | np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, index within the dataset) for every place in `index` [n] of an endless blend, both int64 [n], in memory O(n).

    Each dataset's own indices come in order without gap or repeat, and after any number of samples its share is within
    2 + ln(datasets) samples of its weight (stratified, hence less noisy than random draws). A chain of two-way splits: of the i
    places that reach dataset j, floor(i * p + phase) are its own, p being its share of what is left (a Beatty sequence).
    """
    shares = normalized(weights)
    # From the largest down, rounding errors stay small; see the bound above.
    chain = [j for j in np.argsort(-shares, kind="stable") if shares[j] > 0]
    phases = keyed(seed, np.arange(len(chain))) >> np.uint64(32)
    dataset, within = np.full(len(index), chain[-1], np.int64), np.zeros(len(index), np.int64)
    place, left = np.asarray(index).astype(np.uint64), np.arange(len(index))
    tails = np.cumsum(shares[chain][::-1])[::-1]
    for j, tail, phase in zip(chain[:-1], tails, phases, strict=False):
        rate = np.uint64(min(max(round(shares[j] / tail * 2**32), 1), 2**32 - 1))
        before, after = _scaled(place, rate, phase), _scaled(place + np.uint64(1), rate, phase)
        own = after > before
        dataset[left[own]], within[left[own]] = j, before[own].astype(np.int64)
        place, left = (place - before)[~own], left[~own]
    within[left] = place.astype(np.int64)
    return dataset, within


def _scaled(place: np.ndarray, rate: np.uint64, phase: np.uint64) -> np.ndarray:
    """floor((place * rate + phase) / 2**32) without overflow, for rate and phase below 2**32."""
    shift = np.uint64(32)
    return (place >> shift) * rate + (((place & np.uint64(2**32 - 1)) * rate + phase) >> shift)


def megatron_requests(weights: Sequence[float] | np.ndarray, samples: int) -> tuple[list[int], int]:
    """How many samples Megatron-LM asks of each dataset, and the size of the whole blend, to draw `samples` by weight."""
    parts = [math.ceil(samples * weight) for weight in normalized(weights).tolist()]
    return [math.ceil(part * (1 + SURPLUS)) for part in parts], sum(parts)


def megatron_blend(weights: Sequence[float] | np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Megatron-LM's blend, number for number: (dataset int16 [size], index within the dataset int64 [size]).

    At each place, the dataset furthest behind its weight; the first of equals. Each choice hangs on all before it, so this is a
    plain loop (`native_blend` has no such cost). Megatron-LM normalizes explicit weights twice: pass them normalized once.
    """
    shares = normalized(weights).tolist()
    if len(shares) >= 2**15 - 1:
        raise UserError(f"a blend of {len(shares)} datasets: data.order = megatron takes fewer than {2**15 - 1}: use data.order = native")
    taken, choices = [0] * len(shares), array("h")
    for place in range(size):
        scale = float(place or 1)
        behind = [share * scale - count for share, count in zip(shares, taken, strict=True)]
        choice = behind.index(max(behind))
        choices.append(choice)
        taken[choice] += 1
    dataset, within = np.array(choices, np.int16), np.empty(size, np.int64)
    for number, count in enumerate(taken):
        within[dataset == number] = np.arange(count)
    return dataset, within
