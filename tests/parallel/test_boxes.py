"""Boxes against plain indexing: the same elements, in the same order, each once."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.parallel.boxes import Box, boxes_of

lengths = st.integers(1, 5)
without_haste = settings(deadline=None)  # a busy machine is no failure


@st.composite
def box_inside(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, length - 1)) for length in shape)
    return Box(offset, tuple(draw(st.integers(1, length - first)) for first, length in zip(offset, shape, strict=True)))


@st.composite
def boxes(draw: st.DrawFn, count: int) -> tuple[tuple[int, ...], list[Box]]:
    """A shape of up to four dimensions and some boxes in it."""
    shape = tuple(draw(st.lists(lengths, max_size=4)))
    return shape, [draw(box_inside(shape)) for _ in range(count)]


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that holds each element's own number."""
    return torch.arange(math.prod(shape)).view(shape)


@without_haste
@given(boxes(1), st.data())
def test_a_flat_range_of_a_box_is_its_boxes_one_behind_the_other(found: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, (box,) = found
    start, stop = sorted(data.draw(st.tuples(st.integers(0, box.count), st.integers(0, box.count))))
    pieces = list(boxes_of(box, start, stop))
    tensor = numbered(shape)
    values = [tensor[piece.slices()].reshape(-1) for piece in pieces]
    assert torch.equal(torch.cat([torch.arange(0), *values]), tensor[box.slices()].reshape(-1)[start:stop])
    assert all(piece.count == part.numel() > 0 for piece, part in zip(pieces, values, strict=True))
    assert len(pieces) <= max(1, 2 * len(shape) - 1), "no more boxes than are needed"


@without_haste
@given(boxes(1), st.data())
def test_ranges_side_by_side_make_up_the_box(found: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    """As a buffer is dealt to ranks: each element on one of them."""
    shape, (box,) = found
    stops = sorted({0, box.count, *data.draw(st.lists(st.integers(0, box.count), max_size=4))})
    pieces = [piece for start, stop in pairwise(stops) for piece in boxes_of(box, start, stop)]
    times = torch.zeros(shape, dtype=torch.int64)
    for piece in pieces:
        times[piece.slices()] += 1
    assert times.sum() == box.count
    assert (times[box.slices()] == 1).all()
    assert not any(a.meet(b) for i, a in enumerate(pieces) for b in pieces[:i])


@without_haste
@given(boxes(2))
def test_two_boxes_meet_in_their_common_elements(found: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (a, b) = found
    tensor = numbered(shape)
    common = set(tensor[a.slices()].reshape(-1).tolist()) & set(tensor[b.slices()].reshape(-1).tolist())
    met = a.meet(b)
    assert met == b.meet(a)
    assert set(tensor[met.slices()].reshape(-1).tolist() if met else []) == common
    if met:
        for outer in (a, b):
            assert torch.equal(tensor[outer.slices()][met.inside(outer).slices()], tensor[met.slices()])


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 12, [Box((2, 4), (3, 4))]),
        (4, 8, [Box((3, 4), (1, 4))]),
        (5, 7, [Box((3, 5), (1, 2))]),
        (3, 9, [Box((2, 7), (1, 1)), Box((3, 4), (1, 4)), Box((4, 4), (1, 1))]),
        (3, 5, [Box((2, 7), (1, 1)), Box((3, 4), (1, 1))]),
        (6, 6, []),
    ],
)
def test_ranges_of_a_box_of_three_rows(start: int, stop: int, expected: list[Box]) -> None:
    assert list(boxes_of(Box((2, 4), (3, 4)), start, stop)) == expected
