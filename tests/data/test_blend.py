"""Blends: Megatron-LM's choices exactly; native shares right at every moment, each dataset's samples in order without gap."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.config import UserError
from teratron.data.blend import megatron_blend, megatron_requests, native_blend, normalized, parse_blend

WEIGHTS = st.lists(st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 7.0]), min_size=1, max_size=12).filter(any)


def test_parse_follows_megatrons_rule() -> None:
    assert parse_blend(["0.3", "a", "7", "b"]) == [(0.3, Path("a")), (7.0, Path("b"))]
    assert parse_blend(["a"]) == [(None, Path("a"))]
    assert parse_blend(["a", "b"]) == [(None, Path("a")), (None, Path("b"))]
    assert parse_blend(["1", "a", "2"]) == [(None, Path("1")), (None, Path("a")), (None, Path("2"))]
    assert parse_blend(["1", "a", "b", "c"])[0] == (None, Path("1"))


@pytest.mark.parametrize("items", [[], ["-1", "a", "2", "b"], ["0", "a", "0", "b"], ["nan", "a", "1", "b"], ["inf", "a", "1", "b"]])
def test_parse_refuses_weights_that_say_nothing(items: list[str]) -> None:
    with pytest.raises(UserError, match=r"blend weights|data\.train is empty"):
        parse_blend(items)


def test_megatron_vector() -> None:
    dataset, within = megatron_blend([0.7, 0.3], 10)
    assert dataset.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert within.tolist() == [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]
    assert (dataset.dtype, within.dtype) == (np.int16, np.int64)


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.integers(0, 300))
def test_megatron_always_takes_the_dataset_furthest_behind(weights: list[float], size: int) -> None:
    dataset, within = megatron_blend(weights, size)
    taken = np.zeros(len(weights), np.int64)
    for k in range(size):
        assert dataset[k] == np.argmax(normalized(weights) * max(k, 1) - taken)
        assert within[k] == taken[dataset[k]]
        taken[dataset[k]] += 1


def test_megatron_requests_half_a_percent_more_than_its_part() -> None:
    assert megatron_requests([3, 1], 1000) == ([754, 252], 1000)
    assert megatron_requests([1, 1, 1], 100) == ([35, 35, 35], 102)


@settings(max_examples=200, deadline=None)
@given(WEIGHTS, st.integers(0, 2**32), st.integers(1, 2000))
def test_native_blend_is_in_order_without_gap_and_keeps_the_shares(weights: list[float], seed: int, size: int) -> None:
    dataset, within = native_blend(np.arange(size), weights, seed)
    shares = normalized(weights)
    places = np.arange(1, size + 1)
    for j, share in enumerate(shares):
        assert within[dataset == j].tolist() == list(range((dataset == j).sum()))
        behind = np.cumsum(dataset == j) - share * places
        assert np.abs(behind).max() <= 2 + math.log(len(weights))
        assert share > 0 or not (dataset == j).any()


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.integers(0, 9), st.lists(st.integers(0, 2**48), max_size=20))
def test_native_blend_at_one_place_does_not_depend_on_the_others(weights: list[float], seed: int, index: list[int]) -> None:
    together = native_blend(np.array(index, np.int64), weights, seed)
    for k, place in enumerate(index):
        alone = native_blend(np.array([place]), weights, seed)
        assert (together[0][k], together[1][k]) == (alone[0][0], alone[1][0])


def test_native_blend_far_out_still_has_neither_gap_nor_repeat() -> None:
    dataset, within = native_blend(np.arange(2**50, 2**50 + 10_000), [5, 3, 2, 0.1], 1)
    for j in range(4):
        assert np.all(np.diff(within[dataset == j]) == 1)
        assert within[dataset == j][0] == pytest.approx(2**50 * [5, 3, 2, 0.1][j] / 10.1, rel=1e-7)


def test_native_blend_starts_elsewhere_with_another_seed() -> None:
    starts = {tuple(native_blend(np.arange(16), [0.7, 0.3], seed)[0].tolist()) for seed in range(20)}
    assert len(starts) > 5
