"""Samples: each row is what its order says, alone or in any company; evaluation sees every token once; epochs are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.config import UserError
from teratron.data.indexed import IndexedDataset, IndexedWriter
from teratron.data.order import megatron_order
from teratron.data.samples import BlendedSamples, MegatronSamples, NativeSamples, PhasedSamples, Samples, Windows

LENGTHS = [5, 3, 8, 1, 7, 12, 2, 9, 4, 6]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    """Tokens 0 to 56 in ten documents: a token is its own place."""
    return numbered(tmp_path_factory.mktemp("data") / "set", LENGTHS)


def numbered(prefix: Path, lengths: list[int]) -> IndexedDataset:
    with IndexedWriter(prefix, np.uint16) as writer:
        for part in np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]):
            writer.add_document(part)
    return IndexedDataset(prefix)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 20), st.integers(0, 30), st.integers(1, 12), st.integers(0, 99))
def test_native_epochs_are_whole_windows_that_touch(dataset: IndexedDataset, start: int, more: int, seq_length: int, seed: int) -> None:
    stop = min(start + seq_length + 1 + more, 57)
    samples = NativeSamples(dataset, start, stop, seq_length, seed)
    for epoch in range(3):
        rows = samples.rows(np.arange(samples.per_epoch) + epoch * samples.per_epoch)
        begins = np.sort(rows[:, 0])
        assert rows.dtype == np.int64
        assert np.array_equal(rows, rows[:, :1] + np.arange(seq_length + 1))
        assert np.array_equal(begins, begins[0] + np.arange(samples.per_epoch) * seq_length)
        assert rows.min() >= start
        assert rows.max() < stop
        assert stop - start - rows[:, :-1].size < 2 * seq_length


def test_native_epochs_differ_in_offset_and_order(dataset: IndexedDataset) -> None:
    samples = NativeSamples(dataset, 0, 57, 4, 1)
    begins = samples.rows(np.arange(samples.per_epoch * 40))[:, 0].reshape(40, samples.per_epoch)
    offsets = begins.min(axis=1)
    assert set(offsets.tolist()) == set(range(57 - 4 * samples.per_epoch))
    assert len({tuple(row) for row in (begins - offsets[:, None]).tolist()}) == 40
    other = NativeSamples(dataset, 0, 57, 4, 2).rows(np.arange(samples.per_epoch))[:, 0]
    assert not np.array_equal(other, begins[0])


def test_every_token_is_seen_by_native_epochs(dataset: IndexedDataset) -> None:
    samples = NativeSamples(dataset, 3, 50, 5, 1)
    assert set(samples.rows(np.arange(samples.per_epoch * 60)).ravel().tolist()) == set(range(3, 50))


def test_native_refuses_a_part_shorter_than_a_sample(dataset: IndexedDataset) -> None:
    NativeSamples(dataset, 0, 9, 8, 1).rows(np.arange(5))
    with pytest.raises(UserError, match=r"8 tokens in this part, a sample of model.seq_length = 8 needs 9"):
        NativeSamples(dataset, 0, 8, 8, 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(2, 27), st.integers(1, 40))
def test_windows_make_each_token_a_target_once(dataset: IndexedDataset, start: int, tokens: int, seq_length: int) -> None:
    windows = Windows(dataset, start, start + tokens, seq_length)
    rows = windows.rows(np.arange(windows.count))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    assert targets[targets >= 0].tolist() == list(range(start + 1, start + tokens))
    assert inputs[targets >= 0].tolist() == list(range(start, start + tokens - 1))
    assert (targets[:, 0] >= 0).all()
    assert (targets >= 0).sum() == windows.target_tokens


def test_windows_refuse_a_single_token(dataset: IndexedDataset) -> None:
    with pytest.raises(UserError, match="1 tokens to evaluate on"):
        Windows(dataset, 4, 5, 8)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 999), st.sampled_from([range(10), range(2, 9), range(8, 9)]))
def test_megatron_rows_are_cuts_of_the_shuffled_documents(
    dataset: IndexedDataset, count: int, seq_length: int, seed: int, documents: range
) -> None:
    samples = MegatronSamples(dataset, documents, count, seq_length, seed)
    order = megatron_order(dataset.lengths, documents, count, seq_length, seed)
    flat = np.concatenate([dataset.sequence(i) for i in order.document_index])
    rows = samples.rows(np.arange(samples.count))
    assert samples.count >= count
    for i, j in enumerate(order.shuffle_index.astype(int)):
        assert rows[i].tolist() == flat[j * seq_length : (j + 1) * seq_length + 1].tolist()


def test_megatron_rows_pass_over_empty_documents(tmp_path: Path) -> None:
    dataset = numbered(tmp_path / "set", [0, 4, 0, 0, 5, 0, 3, 0])
    samples = MegatronSamples(dataset, range(8), 9, 3, 7)
    order = megatron_order(dataset.lengths, range(8), 9, 3, 7)
    flat = np.concatenate([dataset.sequence(i) for i in order.document_index])
    assert samples.rows(np.array([2]))[0].tolist() == flat[order.shuffle_index[2] * 3 :][:4].tolist()


def test_real_data_in_megatrons_order(shared: Path) -> None:
    dataset = IndexedDataset(shared / "data/megatron_binidx_bigscience/meg-gpt2-openwebtext_text_document")
    samples = MegatronSamples(dataset, range(dataset.document_count), None, 1024, 1234)
    rows = samples.rows(np.arange(samples.count))
    assert samples.count == (dataset.total_tokens - 1) // 1024
    left = np.bincount(dataset.tokens, minlength=5000) - np.bincount(rows[:, :-1].ravel(), minlength=5000)
    assert left.min() >= 0
    assert left.sum() == dataset.total_tokens - samples.count * 1024


def sources(dataset: IndexedDataset) -> list[Samples]:
    native = [NativeSamples(dataset, 0, 30, 4, 1), NativeSamples(dataset, 30, 57, 4, 1)]
    megatron = [MegatronSamples(dataset, part, 40, 4, 1) for part in (range(5), range(5, 10))]
    return [
        native[0],
        Windows(dataset, 0, 57, 4),
        megatron[0],
        BlendedSamples.native(native, [0.8, 0.2], 3),
        BlendedSamples.megatron(megatron, [0.6, 0.4], 50),
        PhasedSamples([(7, native[0]), (0, native[1]), (11, megatron[1])]),
    ]


def test_a_row_depends_on_nothing_but_its_index(dataset: IndexedDataset) -> None:
    """The law behind resuming and behind every layout: any subset, in any order, repeated, gives the same rows."""
    for samples in sources(dataset):
        together = samples.rows(np.arange(14))
        assert together.shape == (14, 5)
        index = np.array([3, 11, 0, 3])
        assert np.array_equal(samples.rows(index), together[index])
        assert samples.rows(np.arange(0)).shape == (0, 5)


def test_indices_outside_are_refused(dataset: IndexedDataset) -> None:
    for samples in sources(dataset):
        with pytest.raises(IndexError, match="sample -1"):
            samples.rows(np.array([-1]))
        if samples.count is not None:
            with pytest.raises(IndexError, match=f"there are {samples.count}"):
                samples.rows(np.array([samples.count]))


def test_native_blend_draws_each_part_in_its_own_order(dataset: IndexedDataset) -> None:
    parts = [NativeSamples(dataset, 0, 30, 4, 1), NativeSamples(dataset, 30, 57, 4, 1)]
    rows = BlendedSamples.native(parts, [3, 1], 5).rows(np.arange(400))
    for part, mine in zip(parts, (rows[:, 0] < 30, rows[:, 0] >= 30), strict=True):
        assert np.array_equal(rows[mine], part.rows(np.arange(mine.sum())))
    assert abs((rows[:, 0] < 30).sum() - 300) <= 3


def test_megatron_blend_takes_its_parts_in_order_or_refuses(dataset: IndexedDataset) -> None:
    parts = [MegatronSamples(dataset, part, None, 4, 1) for part in (range(5), range(5, 10))]
    rows = BlendedSamples.megatron(parts, [0.7, 0.3], 8).rows(np.arange(8))
    expected = [parts[d].rows(np.array([k]))[0] for d, k in [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3), (0, 4), (1, 2)]]
    assert np.array_equal(rows, np.array(expected))
    with pytest.raises(UserError, match="dataset 0 of the blend has 5 samples, its weight needs 14"):
        BlendedSamples.megatron(parts, [0.7, 0.3], 20)


def test_a_new_phase_never_changes_the_old_one(dataset: IndexedDataset) -> None:
    first, second = MegatronSamples(dataset, range(10), 12, 4, 1), MegatronSamples(dataset, range(10), 30, 4, 1)
    short, longer = PhasedSamples([(12, first)]), PhasedSamples([(12, first), (30, second)])
    assert longer.count == 42
    assert np.array_equal(longer.rows(np.arange(12)), short.rows(np.arange(12)))
    assert np.array_equal(longer.rows(np.arange(12, 42)), second.rows(np.arange(30)))
    with pytest.raises(ValueError, match="a phase of 99 samples"):
        PhasedSamples([(99, first)])
