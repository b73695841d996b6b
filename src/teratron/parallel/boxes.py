"""Boxes: rectangular pieces of a tensor, and the flat ranges of a buffer written as boxes (contract C10)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Elements [offset, offset + size) in each dimension of a tensor of some full shape."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.size)

    def slices(self) -> tuple[slice, ...]:
        """The index that takes this box out of the full tensor."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))

    def inside(self, outer: Box) -> Box:
        """The same elements, counted from the corner of a box that contains them."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.size)

    def meet(self, other: Box) -> Box | None:
        """The elements in both, or None."""
        starts = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stops = [min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True)]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            return None
        return Box(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


def boxes_of(box: Box, start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a box in row-major order, as boxes of the same full shape, in that order.

    A range that begins and ends within rows gives at most 2 * dimensions - 1 boxes.
    """
    if start >= stop:
        return
    if len(box.size) <= 1:
        yield Box(tuple(first + start for first in box.offset), (stop - start,) * len(box.size))
        return
    row = math.prod(box.size[1:])
    first, last = -(-start // row), stop // row  # whole rows [first, last)
    if first > last:  # within one row
        yield from _within_row(box, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within_row(box, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((box.offset[0] + first, *box.offset[1:]), (last - first, *box.size[1:]))
    if last * row < stop:
        yield from _within_row(box, last, 0, stop - last * row)


def _within_row(box: Box, row: int, start: int, stop: int) -> Iterator[Box]:
    for inner in boxes_of(Box(box.offset[1:], box.size[1:]), start, stop):
        yield Box((box.offset[0] + row, *inner.offset), (1, *inner.size))


def nothing() -> None:
    """Nothing is to be done."""


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor: a contiguous range of memory that is some boxes of the full shape, one behind the other."""

    name: str
    """Such as `weight/blocks.0.attention.q.weight`."""
    shape: tuple[int, ...]
    """Full, unpadded shape of the tensor."""
    boxes: tuple[Box, ...]
    values: Tensor
    """1-D view of the memory, as many elements as the boxes have."""
    first: bool = True
    """Whether this rank is the first of those that hold the same elements: only that one saves them."""
    lasting: bool = False
    """Whether the memory never changes while training goes on."""
    done: Callable[[], None] = field(default=nothing, compare=False)
    """To be called when the memory has been read or written to: it may lie in a file."""
