"""Which keys a query sees by their places alone: a rule, and the tiles that a computation needs which leaves out what nobody sees.

Windows, with gaps (Beltagy et al. 2020) or without; the strided and fixed patterns of Child et al. 2019; global tokens (Beltagy et
al. 2020), which in a decoder are attention sinks (Xiao et al. 2024).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from teratron.config import ModelConfig

Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
LEAST_ROWS = 32
"""Queries of a tile at least: smaller matrix products waste more than keys that are computed in vain."""
MOST_COLUMNS = 1024
"""Keys of a tile at most, where all of a long sequence is seen."""


@dataclass(frozen=True)
class Pattern:
    """A rule on places; whether later keys are seen is not its matter. All queries see themselves."""

    window: int = 0
    """Keys are seen that are nearer than this; 0 = all."""
    kind: str = "window"
    """window: no others; strided: and those at multiples of the window; fixed: those of the query's own block of so many
    tokens, not those that are near, and the last ones of all blocks."""
    dilation: int = 1
    """Of a plain window only keys at multiples of this are seen."""
    summary: int = 1
    """The last ones of a block, how many."""
    global_tokens: int = 0
    """The first so many keys are seen by all, and these tokens see all."""

    def sees(self, query: Any, key: Any) -> Any:
        """Whether places see places; integers, or arrays or tensors of them that broadcast."""
        if not self.window:
            return (query == query) & (key == key)
        apart = abs(query - key)
        if self.kind == "fixed":
            seen = (query // self.window == key // self.window) | (key % self.window >= self.window - self.summary)
        else:
            seen = apart < self.window
            seen = seen | (apart % self.window == 0) if self.kind == "strided" else seen & (apart % self.dilation == 0)
        return seen | (key < self.global_tokens) | (query < self.global_tokens)

    @property
    def reach(self) -> int:
        """No later query but a global token sees a key so far back, unless it is global; 0 = there is no such distance."""
        return self.window if self.kind == "window" else 0


FULL = Pattern()


def pattern_of(config: ModelConfig) -> Pattern:
    """That of a model's local layers."""
    return Pattern(config.window, config.pattern, config.dilation, config.summary, config.global_tokens)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Rectangles of queries and keys that are alike but for their places."""

    rows: Places
    """Which queries, [n, b]."""
    columns: Places
    """Which keys, [n, m]."""
    unseen: Mask | None
    """True where a query of a rectangle does not see the key, [b, m]; None = all see all."""

    @property
    def area(self) -> int:
        return int(self.rows.size * self.columns.shape[1])

    @property
    def seen(self) -> int:
        """Pairs of a query and a key that it sees."""
        return self.area if self.unseen is None else self.rows.shape[0] * int((~self.unseen).sum())


@dataclass(frozen=True)
class _Part:
    """A share of what a pattern lets see; the shares of one pattern have no pair in common."""

    queries: range
    """The places of the queries that it concerns."""
    stride: int
    """Those of a tile are so far apart."""
    border: int
    """No tile has queries on both sides of a multiple of this; 0 = any may."""
    rows: int
    """Queries of a tile at most."""
    columns: Callable[[int, int], Places]
    """The keys that queries from one place to another see, and a few that only some of them do."""
    sees: Callable[[Places, Places], Any]
    """Which of these they see, later keys aside."""


@functools.lru_cache(maxsize=256)
def tiles_of(pattern: Pattern, causal: bool, queries: tuple[range, ...], keys: tuple[range, ...], most_rows: int) -> tuple[Tiles, ...]:
    """Tiles that hold every pair of a query and a key that it sees exactly once; their rows and columns are indices.

    queries, keys: their places in ascending runs, such as (range(0, S),). most_rows: queries of a tile at most.
    """
    length = max(run.stop for run in queries + keys)
    row_of, column_of = _indices(queries, length), _indices(keys, length)
    parts = _parts(pattern, causal, length, most_rows)
    alike: dict[Any, list[tuple[Places, Places]]] = {}
    for number, part in enumerate(parts):
        for rows in _row_blocks(part, queries):
            columns = part.columns(int(rows[0]), int(rows[-1]))
            columns = columns[(columns >= 0) & (columns < (rows[-1] + 1 if causal else length))]
            columns = columns[column_of[columns] >= 0]
            for some in (columns[start : start + MOST_COLUMNS] for start in range(0, len(columns), MOST_COLUMNS)):
                open_to_all = part.sees is _all and not (causal and some[-1] > rows[0])
                shape = len(some) if open_to_all else (some - rows[0]).tobytes()
                alike.setdefault((number, len(rows), shape), []).append((rows, some))
    found = []
    for (number, *_), tiles in alike.items():
        rows, columns = (np.stack(places) for places in zip(*tiles, strict=True))
        query, key = rows[0][:, None], columns[0]
        unseen = ~(np.broadcast_to(parts[number].sees(query, key), (query.size, key.size)) & ((key <= query) | (not causal)))
        if not unseen.all():
            found.append(Tiles(row_of[rows], column_of[columns], unseen if unseen.any() else None))
    return tuple(found)


def keys_seen(pattern: Pattern, causal: bool, length: int) -> float:
    """How many keys a query of a sequence sees, on average; with nothing left out half of them is what the field counts as causal."""
    if not pattern.window:
        return length / 2 if causal else length
    whole = (range(length),)
    return sum(tiles.seen for tiles in tiles_of(pattern, causal, whole, whole, 128)) / length


def _indices(runs: Sequence[range], length: int) -> Places:
    """The index of every place, -1 where it is not among the runs'."""
    index, places = np.full(length, -1), np.concatenate(runs)
    index[places] = np.arange(len(places))
    return index


def _row_blocks(part: _Part, runs: Sequence[range]) -> Iterator[Places]:
    """The places of a part's queries, tile by tile."""
    for run in runs:
        begin, end = max(run.start, part.queries.start), min(run.stop, part.queries.stop)
        for offset in range(part.stride):
            rows = np.arange(begin + offset, end, part.stride)
            borders = np.flatnonzero(np.diff(rows // part.border)) + 1 if part.border else ()
            for block in np.split(rows, borders):
                yield from (block[start : start + part.rows] for start in range(0, len(block), part.rows))


def _parts(pattern: Pattern, causal: bool, length: int, most_rows: int) -> list[_Part]:
    """The parts of a pattern in a sequence of a length."""
    window, first = pattern.window, pattern.global_tokens
    height = min(most_rows, max(LEAST_ROWS, window // 4))
    every, others = range(length), range(0 if causal else first, length)

    def local(columns: Callable[[int, int], Places]) -> Callable[[int, int], Places]:
        """Without the global tokens, which are parts of their own."""
        return lambda top, end: (found := columns(top, end))[found >= first]

    if not window:
        return [_Part(every, 1, 0, most_rows, lambda top, end: np.arange(end + 1 if causal else length), _all)]
    if pattern.kind == "fixed":
        block = np.arange(length) // window
        summaries = np.flatnonzero(np.arange(length) % window >= window - pattern.summary)
        own = local(lambda top, end: np.flatnonzero(block == block[top]))
        other = local(lambda top, end: summaries[block[summaries] != block[top]])
        parts = [_Part(others, 1, window, height, own, _all), _Part(others, 1, window, most_rows, other, _all)]
    else:
        gap = pattern.dilation
        reach = (window - 1) // gap * gap
        near = local(lambda top, end: np.arange(top - reach, end + reach + 1, gap))
        parts = [_Part(others, gap, 0, height, near, lambda query, key: abs(query - key) < window)]
    if pattern.kind == "strided":
        far = local(lambda top, end: np.arange(top % window, length, window))
        parts.append(_Part(others, window, 0, most_rows, far, lambda query, key: query != key))
    if first:
        parts.append(_Part(others, 1, 0, most_rows, lambda top, end: np.arange(first), _all))
    if first and not causal:
        parts.append(_Part(range(first), 1, 0, most_rows, lambda top, end: np.arange(length), _all))
    return parts


def _all(query: Places, key: Places) -> bool:
    return True
