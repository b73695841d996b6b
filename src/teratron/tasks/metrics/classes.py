"""One label for each example: accuracy, F1 and Matthews' correlation, by scikit-learn's rules (0 where a quotient has no denominator)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Labels = Sequence[Any] | np.ndarray


def accuracy(predicted: Labels, gold: Labels) -> float:
    """Share of the examples whose label is right."""
    _, guessed, right = _encoded(predicted, gold)
    return float((guessed == right).mean())


def f1(predicted: Labels, gold: Labels, average: Literal["binary", "macro", "micro", "weighted"] = "macro", positive: Any = 1) -> float:
    """Harmonic mean of precision and recall.

    average: binary = of the label `positive` alone; macro = mean over the labels that occur; weighted = weighed by how often each is
    right; micro = of all decisions together, which is the accuracy.
    """
    labels, guessed, right = _encoded(predicted, gold)
    hits, found, there = (np.bincount(x, minlength=len(labels)) for x in (right[guessed == right], guessed, right))
    if average == "micro":
        return float(hits.sum() / there.sum())
    scores = 2 * hits / (found + there)
    if average == "binary":
        return float(scores[labels == positive].sum())
    return float(np.average(scores, weights=there if average == "weighted" else None))


def matthews(predicted: Labels, gold: Labels) -> float:
    """Matthews' correlation of any number of classes (Gorodkin 2004); 0 where all predictions, or all labels, are alike."""
    labels, guessed, right = _encoded(predicted, gold)
    hits = float((guessed == right).sum())
    found, there = (np.bincount(x, minlength=len(labels)).astype(np.float64) for x in (guessed, right))
    count = float(len(right))
    spread = (count**2 - found @ found) * (count**2 - there @ there)
    return (hits * count - float(found @ there)) / float(np.sqrt(spread)) if spread else 0.0


def _encoded(predicted: Labels, gold: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels that occur, and the places of both sequences' labels among them."""
    guessed, right = np.asarray(predicted), np.asarray(gold)
    if guessed.shape != right.shape or not right.size:
        raise ValueError(f"{guessed.size} predictions for {right.size} labels: expected as many of each, at least one")
    labels, places = np.unique(np.concatenate([guessed, right]), return_inverse=True)
    return labels, places[: len(guessed)], places[len(guessed) :]
