"""Patterns of attention are what their papers say, and tiles hold every pair that is seen exactly once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from teratron.config import Config, ModelConfig, UserError
from teratron.models.patterns import FULL, Pattern, keys_seen, tiles_of

PATTERNS = [
    FULL,
    Pattern(5),
    Pattern(7, dilation=3),
    Pattern(6, "strided"),
    Pattern(6, "fixed", summary=2),
    Pattern(5, global_tokens=3),
    Pattern(6, "strided", global_tokens=1),
    Pattern(6, "fixed", global_tokens=2),
]


def seen_by(pattern: Pattern, query: int, length: int) -> set[int]:
    return {key for key in range(length) if pattern.sees(query, key)}


def test_each_pattern_is_its_papers() -> None:
    assert seen_by(Pattern(3), 10, 20) == {8, 9, 10, 11, 12}
    assert seen_by(Pattern(7, dilation=3), 10, 20) == {4, 7, 10, 13, 16}
    assert seen_by(Pattern(4, "strided"), 10, 20) == {7, 8, 9, 10, 11, 12, 13} | {2, 6, 14, 18}
    assert seen_by(Pattern(4, "fixed"), 10, 20) == {8, 9, 10, 11} | {3, 7, 15, 19}
    assert seen_by(Pattern(4, "fixed", summary=2), 10, 20) == {8, 9, 10, 11} | {2, 3, 6, 7, 14, 15, 18, 19}
    assert seen_by(Pattern(2, global_tokens=2), 10, 20) == {0, 1, 9, 10, 11}
    assert seen_by(Pattern(2, global_tokens=2), 1, 20) == set(range(20))
    assert seen_by(FULL, 10, 20) == set(range(20))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_hold_every_pair_that_is_seen_once_and_no_other(pattern: Pattern, causal: bool) -> None:
    whole = [(range(length),) for length in (1, 5, 37, 64)]
    mine, theirs = (range(0, 10), range(30, 40)), (range(10, 20), range(20, 30))  # as ranks of a ring have them
    pairs = [(runs, runs) for runs in [*whole, mine]] + [(mine, theirs), (theirs, mine)]
    for (queries, keys), rows in itertools.product(pairs, (4, 8, 128)):
        query, key = np.concatenate(queries)[:, None], np.concatenate(keys)
        expected = pattern.sees(query, key) & ((key <= query) | (not causal))
        found = np.zeros(expected.shape, int)
        for tiles in tiles_of(pattern, causal, queries, keys, rows):
            for some_rows, columns in zip(tiles.rows, tiles.columns, strict=True):
                found[np.ix_(some_rows, columns)] += 1 if tiles.unseen is None else ~tiles.unseen
        assert (found == expected).all()


@pytest.mark.parametrize("pattern", [Pattern(64), Pattern(128, dilation=4), Pattern(64, global_tokens=4)], ids=str)
def test_the_work_of_a_window_grows_with_the_length_alone(pattern: Pattern) -> None:
    areas = []
    for length in (2048, 4096, 8192, 16384):
        whole = (range(length),)
        areas.append(sum(tiles.area for tiles in tiles_of(pattern, True, whole, whole, 128)))
    steps = [after - before for before, after in itertools.pairwise(areas)]
    assert steps[1:] == [2 * step for step in steps[:-1]]
    assert areas[0] < 2048**2 / 8


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_the_work_of_sparse_patterns_stays_far_below_all_pairs(kind: str) -> None:
    length = 4096
    whole = (range(length),)
    assert sum(tiles.area for tiles in tiles_of(Pattern(64, kind), True, whole, whole, 128)) < length**2 / 16


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_keys_seen_is_the_mean_over_queries(pattern: Pattern, causal: bool) -> None:
    places = np.arange(50)
    seen = pattern.sees(places[:, None], places) & ((places <= places[:, None]) | (not causal))
    assert keys_seen(pattern, causal, 50) == seen.sum() / 50


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"window": 17}, "model.window = 17 is longer than model.seq_length = 16: lower it, or leave it out for attention over all"),
        ({"pattern": "strided"}, "model.pattern = strided concerns attention over a window, but model.window = 0 .* set model.window"),
        ({"global_tokens": 2}, "model.global_tokens = 2 concerns attention over a window"),
        ({"global_every": 2}, "model.global_every = 2 concerns attention over a window"),
        (
            {"window": 4, "dilation": 2, "pattern": "fixed"},
            "model.dilation = 2 does not fit model.pattern = fixed .* choose pattern window",
        ),
        ({"window": 4, "dilation": 4}, "model.dilation = 4 does not fit .* a dilation below the window"),
        ({"window": 4, "summary": 2}, "model.summary = 2 does not fit model.pattern = window .* choose pattern fixed"),
        ({"window": 4, "summary": 4, "pattern": "fixed"}, "model.summary = 4 does not fit .* a summary below the window"),
        ({"window": 4, "global_tokens": 16}, "model.global_tokens = 16 leaves no other token of model.seq_length = 16: lower it"),
        (
            {"window": 4, "global_every": 1},
            "model.global_every = 1 makes every layer attend over all tokens: leave it and model.window out",
        ),
        ({"window": 4, "global_every": 13}, "model.global_every = 13 makes none of model.layers = 12 attend over all tokens: lower it"),
    ],
)
def test_patterns_that_cannot_be_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(seq_length=16, **keys)  # type: ignore[arg-type]


def test_global_tokens_of_a_sample_are_refused_with_documents_apart() -> None:
    with pytest.raises(UserError, match=r"model.global_tokens = 2 are .* data.isolate_documents = true .* leave one out"):
        Config().override({"model.window": 4, "model.global_tokens": 2, "data.isolate_documents": True})
