"""The layout of samples over data sets: splits that lose nothing, blends by weight, phases that leave the past as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teratron.config import Config, UserError
from teratron.data.indexed import IndexedDataset, IndexedWriter
from teratron.data.layout import Source, open_sources, token_ranges, train_samples, valid_windows
from teratron.data.order import megatron_order

LENGTHS = [13, 7, 22, 5, 31, 9, 17, 3, 28, 11, 19, 6, 25, 4, 40, 15]


def numbered(prefix: Path, first: int = 0, lengths: list[int] = LENGTHS) -> IndexedDataset:
    """Tokens that are their own place, from `first` on."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for part in np.split(np.arange(first, first + sum(lengths)), np.cumsum(lengths)[:-1]):
            writer.add_document(part)
    return IndexedDataset(prefix)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    return numbered(tmp_path_factory.mktemp("layout") / "a")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    return numbered(tmp_path_factory.mktemp("layout") / "b", first=1000)


def config(**keys: Any) -> Config:
    return Config().override(
        {"model.seq_length": 8, "train.global_batch": 4} | {name.replace("__", "."): value for name, value in keys.items()}
    )


@pytest.mark.parametrize(
    ("split", "cut", "end"), [("90,10", 229, 255), ("99,1", 252, 255), ("969,30,1", 247, 254), ("1", 255, None), ("0,1", None, 255)]
)
def test_native_order_cuts_the_token_stream(dataset: IndexedDataset, split: str, cut: int | None, end: int | None) -> None:
    train, valid = token_ranges(dataset, "native", split)
    assert train == (range(cut) if cut else None)
    assert valid == (range(cut or 0, end) if end else None)


def test_the_cut_is_nanogpts(tmp_path: Path) -> None:
    """The first int(0.9 * n) tokens, as its recipe has it, for any n."""
    for count in range(11, 60):
        train, valid = token_ranges(numbered(tmp_path / str(count), lengths=[count]), "native", "90,10")
        assert train == range(int(count * 0.9))
        assert valid == range(int(count * 0.9), count)


def test_megatron_order_cuts_between_documents(dataset: IndexedDataset) -> None:
    train, valid = token_ranges(dataset, "megatron", "75,25")
    assert train == range(sum(LENGTHS[:12]))
    assert valid == range(sum(LENGTHS[:12]), sum(LENGTHS))


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_training_and_evaluation_share_no_token(dataset: IndexedDataset, order: str) -> None:
    settings = config(data__order=order)
    samples, tokens = train_samples(settings, [Source(dataset, None)], "75,25", (20,))
    windows, _ = valid_windows(settings, [Source(dataset, None)], "75,25")
    assert windows is not None
    seen, held_out = samples.rows(np.arange(80)), windows.rows(np.arange(windows.count))
    assert seen.max() < tokens
    assert np.array_equal(held_out[:, 1:][held_out[:, 1:] >= 0], np.arange(tokens + 1, 255))


def test_several_held_out_sets_are_evaluated_one_after_another(dataset: IndexedDataset, other: IndexedDataset) -> None:
    windows, targets = valid_windows(config(), [Source(dataset, None), Source(other, None)], "0,1")
    assert windows is not None
    assert targets == 2 * 254
    rows = windows.rows(np.arange(windows.count))
    assert np.array_equal(rows[:, 1:][rows[:, 1:] >= 0], np.concatenate([np.arange(1, 255), np.arange(1001, 1255)]))
    backwards = windows.rows(np.arange(windows.count)[::-1])
    assert np.array_equal(backwards[::-1], rows)


def test_megatron_order_is_the_order_of_the_spec(dataset: IndexedDataset) -> None:
    samples, _ = train_samples(config(data__order="megatron", train__seed=5), [Source(dataset, None)], "1", (30,))
    order = megatron_order(dataset.lengths, range(16), 120, 8, 5)
    place, offset = order.sample_index[order.shuffle_index[0]]
    assert samples.rows(np.arange(1))[0, 0] == dataset.starts[order.document_index[place]] + offset


@pytest.mark.parametrize("order", ["native", "megatron"])
@pytest.mark.parametrize("blended", [False, True])
def test_more_steps_leave_the_old_samples_as_they_were(dataset: IndexedDataset, other: IndexedDataset, order: str, blended: bool) -> None:
    sources = [Source(dataset, 3.0), Source(other, 1.0)] if blended else [Source(dataset, None)]
    settings = config(data__order=order)
    short, _ = train_samples(settings, sources, "1", (20,))
    long, _ = train_samples(settings, sources, "1", (20, 30))
    old = np.arange(20 * 4)
    assert np.array_equal(short.rows(old), long.rows(old))
    new = long.rows(np.arange(20 * 4, 50 * 4))
    assert new.min() >= 0
    assert not np.array_equal(new[:80], short.rows(old)), "the next phase has an order of its own"


def test_one_long_phase_is_another_megatron_order(dataset: IndexedDataset) -> None:
    """Which is why phases exist: its order depends on how many samples are drawn."""
    one, _ = train_samples(config(data__order="megatron"), [Source(dataset, None)], "1", (50,))
    two, _ = train_samples(config(data__order="megatron"), [Source(dataset, None)], "1", (20, 30))
    assert not np.array_equal(one.rows(np.arange(80)), two.rows(np.arange(80)))


def test_native_order_needs_no_state(dataset: IndexedDataset) -> None:
    """Any sample at once, far beyond the steps of the run, the same from a fresh object and in any company."""
    samples, _ = train_samples(config(), [Source(dataset, None)], "1", (1,))
    far = np.array([10**12 + 7, 3, 10**9])
    together = samples.rows(far)
    fresh, _ = train_samples(config(), [Source(dataset, None)], "1", (500,))
    for row, index in zip(together, far, strict=True):
        assert np.array_equal(fresh.rows(np.array([index]))[0], row)


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_a_blend_follows_its_weights(dataset: IndexedDataset, other: IndexedDataset, order: str) -> None:
    samples, tokens = train_samples(config(data__order=order), [Source(dataset, 3.0), Source(other, 1.0)], "1", (100,))
    first = samples.rows(np.arange(400))[:, 0] < 1000
    assert abs(first.sum() - 300) <= 3
    assert tokens == 510


def test_sets_without_weights_count_by_their_length(dataset: IndexedDataset, tmp_path: Path) -> None:
    small = numbered(tmp_path / "small", first=5000, lengths=[85])
    samples, _ = train_samples(config(), [Source(dataset, None), Source(small, None)], "1", (100,))
    assert abs((samples.rows(np.arange(400))[:, 0] >= 5000).sum() - 100) <= 3


def test_megatron_order_without_weights_draws_each_set_once(dataset: IndexedDataset, other: IndexedDataset) -> None:
    sources = [Source(dataset, None), Source(other, None)]
    samples, _ = train_samples(config(data__order="megatron"), sources, "1", (15,))
    assert len(np.unique(samples.rows(np.arange(60))[:, 0])) == 60
    with pytest.raises(UserError, match="holds 62 samples, the run draws 64: give weights, or fewer steps"):
        train_samples(config(data__order="megatron"), sources, "1", (16,))


def test_weights_and_prefixes_are_read_from_the_config(dataset: IndexedDataset, other: IndexedDataset) -> None:
    weighted = open_sources(["2", str(dataset.prefix), "0.5", str(other.prefix)])
    assert [(source.dataset.prefix, source.weight) for source in weighted] == [(dataset.prefix, 2.0), (other.prefix, 0.5)]
    assert [source.weight for source in open_sources([str(dataset.prefix), str(other.prefix)])] == [None, None]


@pytest.mark.parametrize("order", ["native", "megatron"])
@pytest.mark.parametrize("split", ["x", "", "0,0", "1,1,1,1", "1..2,3", "."])
def test_splits_that_mean_nothing_are_refused(dataset: IndexedDataset, order: str, split: str) -> None:
    with pytest.raises(UserError, match=r"data\.split = "):
        token_ranges(dataset, order, split)


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_a_split_without_training_data_is_refused_by_the_name_of_the_set(dataset: IndexedDataset, order: str) -> None:
    with pytest.raises(UserError, match=r"a: nothing is left for training with data\.split = '0,1'"):
        train_samples(config(data__order=order), [Source(dataset, None)], "0,1", (1,))


def test_a_split_without_held_out_data_is_none(dataset: IndexedDataset) -> None:
    assert valid_windows(config(), [Source(dataset, None)], "1,0") == (None, 0)
