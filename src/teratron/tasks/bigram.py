"""The bigram baseline: how well the previous token alone predicts the next one. A model must fall well below it."""

from __future__ import annotations

import math

import numpy as np

SMOOTHING = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def bigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Mean loss (nats a token) of a bigram model counted on `train` and judged on `held_out`, both token streams.

    Counts are smoothed towards the unigram distribution (Dirichlet prior); of a few strengths the one that is best on the
    held-out stream is taken, which flatters the baseline. NaN when the held-out stream has no pair.
    """
    if len(held_out) < 2:
        return math.nan
    train, held_out = train.astype(np.int64), held_out.astype(np.int64)
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    contexts = np.bincount(train[:-1], minlength=vocab_size).astype(np.float64)
    unigram = (np.bincount(train, minlength=vocab_size) + 1.0) / (len(train) + vocab_size)
    previous, following = held_out[:-1], held_out[1:]
    wanted = previous * vocab_size + following
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counts = np.where(pairs[place] == wanted, pair_counts[place], 0).astype(np.float64)
    losses = [-np.log((counts + k * unigram[following]) / (contexts[previous] + k)).mean() for k in SMOOTHING]
    return float(min(losses))
