"""Corruptions: nothing is lost, rates and lengths are those asked for, and each is a function of the tokens and the numbers drawn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from teratron.objectives.corruption import (
    Draw,
    infilling,
    permuted,
    poisson,
    random_parts,
    span_corruption,
    span_counts,
    thinned,
)
from teratron.objectives.masking import uniform

SENTINELS = np.arange(10_000, 10_500)
MASK = 9_999


def draw_of(sample: int) -> Draw:
    return lambda name, count: uniform(7, name, sample, count)


def restored(read: np.ndarray, written: np.ndarray) -> list[int]:
    """What was read with each sentinel replaced by what was written behind it."""
    spans: dict[int, list[int]] = {}
    for token in written.tolist():
        if token >= SENTINELS[0]:
            current = spans[token] = []
        else:
            current.append(token)
    return [token for place in read.tolist() for token in spans.get(place, [place])]


@pytest.mark.parametrize(("length", "density", "mean_span"), [(568, 0.15, 3), (2, 0.15, 3), (7, 0.9, 1), (200, 0.5, 64), (31, 0.5, 1)])
def test_spans_fill_the_gaps_of_what_is_read(length: int, density: float, mean_span: float) -> None:
    tokens = np.arange(length)
    noise, spans = span_counts(length, density, mean_span)
    for sample in range(20):
        read, written = span_corruption(tokens, density, mean_span, SENTINELS, draw_of(sample))
        assert restored(read, written) == tokens.tolist()
        assert (len(read), len(written)) == (length - noise + spans, noise + spans)
        for sequence in (read, written):
            assert sequence[sequence >= SENTINELS[0]].tolist() == SENTINELS[:spans].tolist(), "sentinels come in order, each once"


def test_t5s_lengths() -> None:
    """568 tokens become 512 and 114, their ends included, with density 0.15 and spans of 3 (Raffel et al. 2020)."""
    noise, spans = span_counts(568, 0.15, 3)
    assert (568 - noise + spans + 1, noise + spans + 1) == (512, 114)


def test_noise_falls_on_all_tokens_alike_but_the_ends() -> None:
    hits, samples = np.zeros(60), 1000
    for sample in range(samples):
        read, _ = span_corruption(np.arange(60), 0.25, 3, SENTINELS, draw_of(sample))
        hits += ~np.isin(np.arange(60), read)
    assert hits.sum() / samples == 15
    assert hits[0] == 0, "T5 begins with what is kept"
    assert np.abs(hits[15:45] / samples - 0.25).max() < 0.05


@pytest.mark.parametrize("count", [1, 3, 6])
def test_compositions_are_positive_and_all_alike_likely(count: int) -> None:
    seen = [tuple(random_parts(6, count, uniform(1, "parts", sample, 6)).tolist()) for sample in range(3000)]
    assert all(len(parts) == count and sum(parts) == 6 and min(parts) > 0 for parts in seen)
    kinds = {parts: seen.count(parts) for parts in set(seen)}
    assert len(kinds) == {1: 1, 3: 10, 6: 1}[count]
    assert max(kinds.values()) < 1.3 * min(kinds.values())


def test_poisson_has_its_mean_and_variance() -> None:
    numbers = poisson(3.0, uniform(1, "poisson", 0, 100_000))
    assert numbers.mean() == pytest.approx(3, abs=0.03)
    assert numbers.var() == pytest.approx(3, abs=0.06)


def test_infilling_takes_the_share_asked_for_and_keeps_the_order() -> None:
    tokens, lost, spans = np.arange(400), 0, []
    for sample in range(250):
        read = infilling(tokens, 0.3, 3.0, MASK, draw_of(sample))
        kept = read[read != MASK]
        assert (np.diff(kept) > 0).all(), "what is kept stays in order, and comes once"
        lost += len(tokens) - len(kept)
        spans.append(np.count_nonzero(read == MASK))
    assert lost == 250 * 120, "30 % of 100,000 tokens"
    assert 120 / np.mean(spans) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_infilling_of_few_tokens_is_no_longer_than_they(length: int) -> None:
    for sample in range(200):
        assert 1 <= len(infilling(np.arange(length), 0.3, 3.0, MASK, draw_of(sample))) <= length


def test_single_tokens_are_masked_or_deleted() -> None:
    tokens = np.arange(200)
    masked, deleted = (thinned(tokens, 0.3, how, MASK, draw_of(3)) for how in ("masking", "deletion"))  # type: ignore[arg-type]
    assert np.count_nonzero(masked == MASK) == 60
    assert ((masked == tokens) | (masked == MASK)).all()
    assert deleted.tolist() == masked[masked != MASK].tolist()


def test_sentences_are_permuted_whole() -> None:
    tokens = np.arange(12)
    ends = np.isin(tokens, (3, 4, 8))
    orders = {tuple(permuted(tokens, ends, draw_of(sample)).tolist()) for sample in range(500)}
    assert len(orders) == 24
    sentences = [[0, 1, 2, 3], [4], [5, 6, 7, 8], [9, 10, 11]]
    for order in orders:
        assert sorted(sentences, key=lambda sentence: order.index(sentence[0])) == _cut(order, sentences)


def _cut(order: tuple[int, ...], sentences: list[list[int]]) -> list[list[int]]:
    lengths = {sentence[0]: len(sentence) for sentence in sentences}
    found, place = [], 0
    while place < len(order):
        found.append(list(order[place : place + lengths[order[place]]]))
        place += lengths[order[place]]
    return found


CORRUPTIONS: list[Callable[..., Any]] = [
    partial(span_corruption, density=0.15, mean_span=3, sentinels=SENTINELS),
    partial(infilling, density=0.3, mean_span=3, mask=MASK),
    partial(thinned, density=0.3, how="deletion", mask=MASK),
]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_sample_is_always_corrupted_alike_and_another_otherwise(corruption: Callable[..., Any]) -> None:
    tokens = np.arange(100)
    one, again, other = (corruption(tokens, draw=draw_of(sample)) for sample in (1, 1, 2))
    assert str(one) == str(again) != str(other)
