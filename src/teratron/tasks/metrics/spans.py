"""Answers that are spans of a text: exact match and F1 by the rules of SQuAD 2.0, where "" says that there is no answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no English article, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, gold: Sequence[str]) -> float:
    """1 where the answer is one of the right ones; none of these = there is no answer."""
    return _best(_exact, predicted, gold)


def span_f1(predicted: str, gold: Sequence[str]) -> float:
    """F1 of the words that are shared with the nearest right answer."""
    return _best(_shared, predicted, gold)


def _best(score: Callable[[str, str], float], predicted: str, gold: Sequence[str]) -> float:
    real = [answer for answer in gold if normalise_answer(answer)] or [""]
    return max(score(normalise_answer(predicted), normalise_answer(answer)) for answer in real)


def _exact(guess: str, right: str) -> float:
    return float(guess == right)


def _shared(guess: str, right: str) -> float:
    words, rights = guess.split(), right.split()
    if not words or not rights:
        return float(words == rights)
    same = sum((Counter(words) & Counter(rights)).values())
    return 2 * same / (len(words) + len(rights))
