"""What the encoder reads: one segment of a raw row, or two, A and B, of which it tells whether and how they belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from teratron.data.samples import Samples
from teratron.data.special import SpecialTokens
from teratron.objectives.masking import uniform


@dataclass(frozen=True)
class Reading:
    """One sequence."""

    tokens: np.ndarray
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP], int64."""
    types: np.ndarray
    """0 up to the first [SEP], then 1."""
    label: int | None = None
    """0 where B follows A; 1 where B is from elsewhere, or stands in front of what it follows; None = there is nothing to tell."""


def single(row: np.ndarray, special: SpecialTokens) -> Reading:
    """A raw row's tokens as they are, documents behind one another."""
    tokens = np.concatenate(([special.ids["cls"]], row, [special.ids["sep"]]))
    return Reading(tokens, np.zeros_like(tokens))


def pair(row: np.ndarray, other: np.ndarray | None, special: SpecialTokens, seed: int, sample: int) -> Reading:
    """Two segments of the longest document in a row, cut between two words; in every other sample, on average, the wrong pair.

    other: the row that a wrong B is from (Devlin et al. 2019); None = the wrong pair is the right one turned round (Lan et al. 2020).
    """
    text = longest_document(row, special.eod)
    where, wrong = uniform(seed, "pair", sample, 2)
    begins = np.flatnonzero(~special.joined(text))
    middle = begins[(begins >= len(text) / 4) & (begins <= 3 * len(text) / 4) & (begins > 0)]
    if not len(middle):
        return _joined(text, text[:0], special, None)
    cut = middle[int(where * len(middle))]
    first, second = text[:cut], text[cut:]
    if wrong < 0.5:
        return _joined(first, second, special, 0)
    if other is None:
        return _joined(second, first, special, 1)
    return _joined(first, longest_document(other, special.eod)[: len(row) - cut], special, 1)


def partners(samples: Samples, index: np.ndarray, seed: int) -> np.ndarray:
    """The sample from which each one's wrong segment would come, int64 [B]: another one wherever there are two."""
    count = samples.count if samples.count is not None else 2**40
    steps = np.array([1 + int(uniform(seed, "partner", int(sample), 1)[0] * (count - 1)) for sample in index])
    return (index + steps) % count


def longest_document(row: np.ndarray, eod: int | None) -> np.ndarray:
    """The longest run of a row's tokens without an end of document."""
    ends = np.flatnonzero(row == eod) if eod is not None else np.empty(0, np.int64)
    bounds = np.concatenate(([-1], ends, [len(row)]))
    longest = int(np.argmax(np.diff(bounds)))
    return row[bounds[longest] + 1 : bounds[longest + 1]]


def _joined(first: np.ndarray, second: np.ndarray, special: SpecialTokens, label: int | None) -> Reading:
    cls, sep = special.ids["cls"], special.ids["sep"]
    tokens = np.concatenate(([cls], first, [sep], second, [sep]))
    return Reading(tokens, (np.arange(len(tokens)) >= len(first) + 2).astype(np.int64), label)
