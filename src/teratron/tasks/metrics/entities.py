"""Named entities: which spans BIO tags mark, and their F1, by seqeval's default rule, which is CoNLL's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Entity = tuple[str, int, int]
"""Type, first word, word behind the last."""


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence's tags, such as B-PER, I-PER, O. An I- that goes on with nothing of its type begins an entity."""
    found: list[Entity] = []
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if mark not in ("B", "I", "O"):
            raise ValueError(f"tag '{tag}' of word {place + 1}: expected O, or B- or I- and a type")
        name = "" if mark == "O" else name or "_"
        if kind and (mark != "I" or name != kind):
            found.append((kind, start, place))
            kind = ""
        if name and not kind:
            start, kind = place, name
    return found


def entity_counts(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each sentence: entities that are right in span and type, that were predicted, and that there are; int64 [N, 3]."""
    pairs = [(set(entities(guess)), set(entities(right))) for guess, right in zip(predicted, gold, strict=True)]
    return np.array([[len(guess & right), len(guess), len(right)] for guess, right in pairs], np.int64).reshape(-1, 3)


def f1_of(counts: np.ndarray) -> float:
    """F1 of all sentences' counts [N, 3] together; 0 where there are none."""
    hits, found, there = counts.sum(0)
    return float(2 * hits / (found + there)) if found + there else 0.0


def entity_f1(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> float:
    """Micro-averaged F1 of whole entities."""
    return f1_of(entity_counts(predicted, gold))
