"""Batches: shift by one, weights where something is learned, positions and segments by document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from teratron.config import UserError
from teratron.data.batch import make_batch

ROWS = np.array([[5, 9, 0, 7, 0, 0, 3], [0, 4, 4, 0, -1, -1, -1]])
"""End of document = 0; the second row is padded."""


def test_plain_batch() -> None:
    batch = make_batch(ROWS, np.array([40, 41]), eod=0, isolate_documents=False, mask_end_of_document=False)
    assert batch["tokens"].tolist() == [[5, 9, 0, 7, 0, 0], [0, 4, 4, 0, 0, 0]]
    assert batch["targets"].tolist() == [[9, 0, 7, 0, 0, 3], [4, 4, 0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert "segments" not in batch
    assert batch["sample"].tolist() == [40, 41]
    assert {name: value.dtype for name, value in batch.items()} == {
        **dict.fromkeys(["tokens", "targets", "positions", "sample"], torch.int64),
        "weights": torch.float32,
    }


def test_documents_isolated_and_ends_masked() -> None:
    batch = make_batch(ROWS, np.array([0, 1]), eod=0, isolate_documents=True, mask_end_of_document=True)
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 2, 2]]
    assert batch["weights"].tolist() == [[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(2, 12)), elements=st.integers(-1, 3)))
def test_documents_equal_a_walk_token_by_token(rows: np.ndarray) -> None:
    before = rows.copy()
    batch = make_batch(rows, np.arange(len(rows)), eod=2, isolate_documents=True, mask_end_of_document=False)
    for row, positions, segments in zip(rows, batch["positions"].tolist(), batch["segments"].tolist(), strict=True):
        position = segment = 0
        for token, *found in zip(row[:-1], positions, segments, strict=True):
            assert found == [position, segment]
            position, segment = (0, segment + 1) if token == 2 else (position + 1, segment)
    batch["tokens"].zero_()
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("key", ["isolate_documents", "mask_end_of_document"])
def test_documents_need_an_end_token(key: str) -> None:
    options = {"isolate_documents": False, "mask_end_of_document": False, key: True}
    with pytest.raises(UserError, match=rf"data\.{key} = true: the tokenizer has no end-of-document token"):
        make_batch(ROWS, np.array([0, 1]), eod=None, **options)
    plain = make_batch(ROWS, np.array([0, 1]), eod=None, isolate_documents=False, mask_end_of_document=False)
    assert plain["weights"].sum() == 9
