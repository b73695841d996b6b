"""Which tokens are masked: whole words and runs of words, each token then replaced or kept; a function of (seed, sample) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teratron.config import ObjectiveConfig
from teratron.data.order import keyed

GEOMETRIC = 0.2
"""Of a geometric n-gram, the probability to end after each word (Joshi et al. 2020)."""


def uniform(seed: int, name: str, sample: int, count: int) -> np.ndarray:
    """`count` numbers from [0, 1), float64: a function of all arguments, of which any prefix is the same for any longer count."""
    salt = int.from_bytes(name.encode()[:7], "little")
    return (keyed(seed, salt, sample, np.arange(max(count, 1)))[:count] >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Masking:
    """Masks a share of a sequence's ordinary tokens (Devlin et al. 2019)."""

    config: ObjectiveConfig
    seed: int

    def chosen(self, joined: np.ndarray, maskable: np.ndarray, sample: int) -> np.ndarray:
        """Which tokens are to be predicted, bool [S].

        joined [S]: whether a token goes on with the word of the one before it; maskable [S]: False at special tokens. Words are
        taken in random order, each with the words after it that make up its n-gram, until `objective.mask_rate` of the maskable
        tokens, at least one, are taken; an n-gram that would exceed that is shortened, and one that meets another is passed over.
        """
        starts, sizes = _words(joined & self.config.whole_words, maskable)
        taken = np.zeros(len(joined), bool)
        # Rounded at random, so that the share is the wanted one on average.
        left = max(1, int(self.config.mask_rate * int(maskable.sum()) + uniform(self.seed, "count", sample, 1)[0]))
        lengths = self.ngrams(len(starts), sample)
        for word in np.argsort(uniform(self.seed, "order", sample, len(starts)), kind="stable").tolist():
            begin = end = starts[word]
            for following in range(word, min(word + lengths[word], len(starts))):
                beyond = starts[following] + sizes[following]
                if starts[following] != end or beyond - begin > left:
                    break
                end = beyond
            if end > begin and not taken[begin:end].any():
                taken[begin:end] = True
                left -= end - begin
            if left == 0:
                break
        return taken

    def ngrams(self, words: int, sample: int) -> list[int]:
        """How many words the n-gram that begins with each word has."""
        sizes = np.arange(1, self.config.max_ngram + 1)
        shares = 1 / sizes if self.config.ngram == "inverse" else (1 - GEOMETRIC) ** (sizes - 1)
        bounds = np.cumsum(shares / shares.sum())[:-1]
        return (1 + np.searchsorted(bounds, uniform(self.seed, "ngram", sample, words), "right")).tolist()

    def corrupted(self, tokens: np.ndarray, chosen: np.ndarray, mask: int, ordinary: np.ndarray, sample: int) -> np.ndarray:
        """The tokens [S] as the model sees them: of those chosen 80 % are `mask`, 10 % any ordinary id, 10 % as they were."""
        fate, which = (uniform(self.seed, name, sample, len(tokens)) for name in ("fate", "which"))
        others = ordinary[(which * len(ordinary)).astype(np.int64)]
        replaced = np.where(fate < 0.8, mask, np.where(fate < 0.9, others, tokens))
        return np.where(chosen, replaced, tokens)


def _words(joined: np.ndarray, maskable: np.ndarray) -> tuple[Sequence[int], Sequence[int]]:
    """Where each word begins, and its tokens; special tokens are in none."""
    begins = np.flatnonzero(maskable & ~joined)
    ends = np.append(np.flatnonzero(~joined), len(joined))
    stops = ends[np.searchsorted(ends, begins, "right")]
    return begins.tolist(), (stops - begins).tolist()
