"""Sample orders: Megatron-LM's numbers exactly, and a keyed permutation that is one and looks random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.config import UserError
from teratron.data.order import keyed, megatron_order, permute, split_documents

LENGTHS = np.array([5, 3, 8, 1, 7, 12, 2, 9, 4, 6], np.int32)
FIRST_EPOCH = [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
ALL = range(10)


def test_vector_of_one_epoch() -> None:
    order = megatron_order(LENGTHS, ALL, 5, 8, 1234)
    assert order.document_index.tolist() == FIRST_EPOCH
    assert order.sample_index.tolist() == [[0, 0], [0, 8], [1, 7], [3, 1], [5, 1], [6, 5], [7, 6], [9, 0]]
    assert order.shuffle_index.tolist() == [6, 4, 0, 5, 3, 2, 1]
    assert (order.document_index.dtype, order.sample_index.dtype, order.shuffle_index.dtype) == (np.int32, np.int32, np.uint32)


def test_vector_with_a_last_epoch_apart() -> None:
    two = megatron_order(LENGTHS, ALL, 8, 8, 1234)
    assert two.document_index.tolist() == [*FIRST_EPOCH, 7, 3, 5, 1, 4, 8, 0, 2, 6, 9]
    assert two.shuffle_index.tolist() == [5, 1, 4, 3, 0, 2, 6, 12, 8, 7, 11, 10, 13, 9]
    three = megatron_order(LENGTHS, ALL, 16, 8, 1234)
    expected = [3, 3, 2, 6, 4, 5, 4, 0, 8, 8, 7, 1, 0, 9, 7, 1, 9, 2, 6, 5, 8, 1, 7, 6, 9, 5, 4, 3, 0, 2]
    assert three.document_index.tolist() == expected
    assert three.shuffle_index.tolist() == [10, 5, 13, 6, 1, 4, 8, 2, 3, 12, 9, 0, 11, 7, 15, 14, 19, 16, 18, 17, 20]


def test_vector_of_a_split() -> None:
    train, valid, test = split_documents("80,10,10", 10)
    assert (train, valid, test) == (range(8), range(8, 9), range(9, 10))
    order = megatron_order(LENGTHS, range(8), 4, 8, 1234)
    assert order.document_index.tolist() == [2, 1, 6, 0, 4, 5, 3, 7]
    assert order.shuffle_index.tolist() == [2, 0, 4, 3, 1]
    assert megatron_order(LENGTHS, range(8, 9), 2, 8, 1234).document_index.tolist() == [8] * 5
    assert megatron_order(LENGTHS, range(9, 10), 1, 8, 1234).document_index.tolist() == [9, 9]


def walked(lengths: list[int], documents: list[int], count: int, seq_length: int, extra: int) -> list[list[int]]:
    """Sample boundaries found token by token: the slow, obvious way."""
    rows, place, offset = [[0, 0]], 0, 0
    for _ in range(count):
        need = seq_length + extra
        while need > lengths[documents[place]] - offset:
            need -= lengths[documents[place]] - offset
            place, offset = place + 1, 0
        offset += need - extra
        rows.append([place, offset])
    return rows


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_boundaries_equal_a_walk_through_the_documents(lengths: list[int], samples: int, seq_length: int, extra: int, seed: int) -> None:
    if not sum(lengths):
        return
    order = megatron_order(np.array(lengths, np.int32), range(len(lengths)), samples, seq_length, seed, extra)
    count = len(order.shuffle_index)
    assert count >= samples
    assert sorted(order.shuffle_index.tolist()) == list(range(count))
    epochs = len(order.document_index) // len(lengths)
    assert np.bincount(order.document_index, minlength=len(lengths)).tolist() == [epochs] * len(lengths)
    assert order.sample_index.tolist() == walked(lengths, order.document_index.tolist(), count, seq_length, extra)


@pytest.mark.parametrize(
    ("name", "part", "samples"), [("7a7ecbfc773569738501a170f4a29a06", 0, 4832), ("9dffd886ee56eacdec1ffc088b9e8543", 1, 560)]
)
def test_equals_the_caches_of_the_real_tool(shared: Path, name: str, part: int, samples: int) -> None:
    folder = shared / "data/megatron_index_cache"
    lengths = np.fromfile(folder / "my-gpt2_text_document.idx", "<i4", 10_000, offset=34)
    documents = split_documents("98,2,0", len(lengths))[part]
    assert documents is not None
    order = megatron_order(lengths, documents, samples, 2048, 1234)
    for values, kind in ((order.document_index, "doc"), (order.sample_index, "sample"), (order.shuffle_index, "shuffle")):
        assert np.array_equal(values, np.load(folder / "index-cache" / f"{name}_{kind}_idx.npy"))


def test_megatron_order_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match=r"hold 57 tokens; model\.seq_length = 57 needs 58"):
        megatron_order(LENGTHS, ALL, None, 57, 1234)
    with pytest.raises(UserError, match="hold 0 tokens"):
        megatron_order(np.zeros(3, np.int32), range(3), 4, 8, 1234)
    with pytest.raises(UserError, match=r"train\.seed = 4294967296"):
        megatron_order(LENGTHS, ALL, 5, 8, 2**32)


def test_split_rounds_half_to_even_and_leaves_empty_parts_out() -> None:
    assert split_documents("1,1", 5) == [range(2), range(2, 5), None]
    assert split_documents("1,1", 7) == [range(4), range(4, 7), None]
    assert split_documents("100", 7) == [range(7), None, None]
    assert split_documents("969, 30, 1", 10_000) == [range(9690), range(9690, 9990), range(9990, 10_000)]
    for bad in ("", "0,0", "1.2.3", "1,1,1,1"):
        with pytest.raises(UserError, match=r"data\.split"):
            split_documents(bad, 10)


@pytest.mark.parametrize("count", [*range(1, 70), 127, 128, 129, 1000, 4097, 65_536, 100_003])
def test_permute_is_a_bijection(count: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(count), count, 7, 1)), np.arange(count))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**64), st.data())
def test_permute_is_one_to_one_at_any_size(count: int, seed: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20, unique=True)))
    values = permute(index, count, seed)
    assert len(set(values.tolist())) == len(index)
    assert values.min() >= 0
    assert values.max() < count
    assert values.tolist() == [int(permute(index[k : k + 1], count, seed)[0]) for k in range(len(index))]


@pytest.mark.parametrize("count", [3, 5, 6, 9, 17, 33, 140])
def test_every_item_lands_everywhere_equally_often(count: int) -> None:
    """Over many keys, both the place of each item and that of each pair of items are uniform (chi-square, 5 sigma)."""
    keys = 20_000 if count < 100 else 5_000
    salt = np.repeat(np.arange(keys), count)
    values = permute(np.tile(np.arange(count), keys), count, 1, salt).reshape(keys, count)
    for item in range(count):
        assert chi_square_sigmas(np.bincount(values[:, item], minlength=count)) < 5
    pairs = np.bincount(values[:, 0] * count + values[:, 1], minlength=count**2).reshape(count, count)
    assert not np.diagonal(pairs).any()
    assert chi_square_sigmas(pairs[~np.eye(count, dtype=bool)]) < 5


def test_the_order_within_one_permutation_looks_random() -> None:
    count = 50_000
    values = permute(np.arange(count), count, 3)
    for lag in (1, 2, 8, 64, 4096):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / np.sqrt(count)
        steps = (values[lag:] - values[:-lag]) % count
        assert chi_square_sigmas(np.bincount(steps * 100 // count, minlength=100)) < 5
    first_half = np.bincount(values[: count // 2] * 100 // count, minlength=100)
    assert chi_square_sigmas(first_half) < 5


def chi_square_sigmas(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic of `counts` lies above that of a uniform distribution."""
    expected, freedom = counts.mean(), len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_other_keys_give_other_permutations() -> None:
    index = np.arange(1000)
    seen = [
        permute(index, 1000, seed, *salts)
        for seed, salts in [(0, ()), (1, ()), (0, (0,)), (0, (1,)), (1, (0,)), (0, (0, 0)), (0, (0, 1)), (0, (1, 0))]
    ]
    for k, values in enumerate(seen):
        for other in seen[:k]:
            assert (values == other).sum() < 12  # 1 expected by chance


def test_a_salt_for_each_element_equals_one_call_a_salt() -> None:
    epoch = np.array([0, 3, 1, 3, 2**40])
    index = np.array([5, 5, 0, 99, 7])
    assert permute(index, 100, 1, epoch).tolist() == [int(permute(index[k : k + 1], 100, 1, int(epoch[k]))[0]) for k in range(5)]
    assert keyed(9, epoch)[1] == keyed(9, 3)[0]


def test_permute_refuses_places_outside() -> None:
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            permute(np.array([0, bad]), 10, 1)
    assert permute(np.array([], np.int64), 10, 1).shape == (0,)
