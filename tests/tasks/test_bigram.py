"""The bigram baseline equals a count by hand, and knows no more than the previous token tells."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from teratron.tasks.bigram import SMOOTHING, bigram_loss


def by_hand(train: list[int], held_out: list[int], vocab_size: int) -> float:
    """The same formula, one pair at a time."""
    pairs, contexts, single = Counter(pairwise(train)), Counter(train[:-1]), Counter(train)
    losses = []
    for strength in SMOOTHING:
        total = 0.0
        for before, after in pairwise(held_out):
            unigram = (single[after] + 1) / (len(train) + vocab_size)
            total -= math.log((pairs[before, after] + strength * unigram) / (contexts[before] + strength))
        losses.append(total / (len(held_out) - 1))
    return min(losses)


def stream(rng: np.random.Generator, length: int, vocab_size: int, dtype: type = np.uint16) -> np.ndarray:
    """Tokens without memory, the low ones more frequent."""
    weights = 1.0 / np.arange(1, vocab_size + 1)
    return rng.choice(vocab_size, length, p=weights / weights.sum()).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_it_equals_a_count_by_hand(dtype: type) -> None:
    """Also where the held-out stream has tokens and pairs that training never saw."""
    rng = np.random.default_rng(0)
    train, held_out = stream(rng, 300, 12, dtype), stream(rng, 80, 20, dtype)
    assert set(held_out.tolist()) - set(train.tolist())
    assert bigram_loss(train, held_out, 20) == pytest.approx(by_hand(train.tolist(), held_out.tolist(), 20), rel=1e-12)


def test_large_vocabularies_keep_their_pairs_apart() -> None:
    """A pair's number exceeds 32 bits here: 100,000 squared."""
    rng = np.random.default_rng(1)
    train, held_out = (99_990 + stream(rng, length, 10, np.int32) for length in (400, 100))
    assert bigram_loss(train, held_out, 100_000) == pytest.approx(by_hand(train.tolist(), held_out.tolist(), 100_000), rel=1e-12)


def test_without_memory_the_previous_token_tells_nothing() -> None:
    """The loss is the stream's entropy, within 1 %."""
    train, held_out = (stream(np.random.default_rng(seed), 100_000, 30) for seed in (2, 3))
    shares = np.bincount(held_out, minlength=30) / len(held_out)
    entropy = float(-(shares * np.log(shares)).sum())
    assert bigram_loss(train, held_out, 30) == pytest.approx(entropy, rel=1e-2)


def test_a_stream_that_its_previous_token_decides_costs_next_to_nothing() -> None:
    cycle = np.tile(np.arange(7, dtype=np.uint16), 1000)
    assert bigram_loss(cycle, cycle[:700], 7) < 0.01 < math.log(7)


def test_nothing_held_out_has_no_loss() -> None:
    assert math.isnan(bigram_loss(np.arange(5), np.arange(1), 5))
