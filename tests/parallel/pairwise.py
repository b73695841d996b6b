"""Covering arrays: few rows in which every two values of different factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]
TRIES, CANDIDATES = 2000, 40
"""Random rows after which a pair counts as impossible; allowed ones from which the best is taken."""


def cover(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool], seed: int = 0) -> list[Row]:
    """Rows of one value a factor, such that every pair of values that allowed rows have is in one of them.

    Greedy: of some random allowed rows with a pair that is still missing, the one with most of the missing. The same for the same seed.
    """
    draw = random.Random(seed)
    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in itertools.combinations(factors, 2) for x, y in itertools.product(factors[a], factors[b])
    )
    rows = []
    while missing:
        wanted = next(iter(missing))
        candidates = list(itertools.islice(filter(allowed, _drawn(factors, wanted, draw)), CANDIDATES))
        if candidates:
            rows.append(max(candidates, key=lambda row: len(pairs(row) & missing.keys())))
        for pair in pairs(rows[-1]) if candidates else {wanted}:
            missing.pop(pair, None)
    return rows


def pairs(row: Row) -> set[Pair]:
    """All pairs of values in a row, each with the names of its factors."""
    return set(itertools.combinations(row.items(), 2))


def _drawn(factors: Mapping[str, Sequence[Any]], wanted: Pair, draw: random.Random) -> Iterator[Row]:
    for _ in range(TRIES):
        yield {name: draw.choice(values) for name, values in factors.items()} | dict(wanted)
