"""Sums over each matrix (or vector) of a model, wherever its pieces are: of stacked experts each is one of its own (contract C11)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teratron.models import Part
from teratron.parallel.boxes import Box
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import DATA

ROW = 1024
"""Elements whose squares are summed in their own type, at least float32, before float64 takes over."""


@dataclass(frozen=True)
class Segment:
    """What is owned here of a matrix: a range of a bucket's owned slice."""

    part: Part
    slot: int
    """Number of the matrix among all of the stages, the same on all ranks that hold them."""
    boxes: tuple[Box, ...]
    """In the matrix."""
    place: slice
    copies: int
    """Ranks with the same stages that own the same elements."""
    first: bool
    """Whether this is the first of them."""


class Matrices:
    """All matrices of which the ranks with the same stages train pieces; those ranks are `group`."""

    def __init__(self, flat: FlatModel) -> None:
        self.flat, self.group = flat, flat.mesh.group(*DATA, "context", "tensor")
        trained = {name for bucket in flat.trained for name in bucket.places}
        parts = [part for part in flat.stages.parts() if part.parameter in trained]
        self.shapes: list[tuple[int, ...]] = []
        """Of every slot."""
        self.tensor_of: list[int] = []
        """The parameter, by number, that a slot is of: fused parts share one."""
        self.starts: dict[str, int] = {}
        """The first slot of each part."""
        parameters = list(dict.fromkeys(part.parameter for part in parts))
        for part in parts:
            stack = part.shape[0] if len(part.shape) > 2 else 1
            self.starts[part.name] = len(self.shapes)
            self.shapes += [part.shape[-2:]] * stack
            self.tensor_of += [parameters.index(part.parameter)] * stack
        self.tied = [self.starts[part.name] for part in parts if part.holders > 1]
        self.segments = [list(self._segments(number)) for number in range(len(flat.trained))]
        """Of every trained bucket."""

    def _segments(self, number: int) -> Iterator[Segment]:
        bucket = self.flat.trained[number]
        same = bucket.sharding.copies
        for part, boxes, place in bucket.owned():
            first = same.rank == 0 and (part.first or part.holders > 1)
            for slot, inner, within in _by_matrix(boxes, place, len(part.shape) > 2):
                yield Segment(part, self.starts[part.name] + slot, inner, within, part.copies * same.size, first)

    def slots(self) -> dict[str, slice]:
        """The slots of each part."""
        ends = [*self.starts.values(), len(self.shapes)][1:]
        return {part: slice(start, end) for (part, start), end in zip(self.starts.items(), ends, strict=True)}

    def squares(self, *kinds: Sequence[Tensor]) -> Tensor:
        """Sums of squares over whole matrices, float64 [kinds, slots], the same on all ranks.

        kinds: each a tensor for every trained bucket, shaped like its owned slice.
        """
        device = self.flat.home.device
        sums = torch.zeros(len(kinds), len(self.shapes), dtype=torch.float64, device=device)
        held = [(number, segment) for number, segments in enumerate(self.segments) for segment in segments]
        if held:
            slots = torch.tensor([segment.slot for _, segment in held], device=device)
            found = [[square(flat[s.place]) / s.copies for flat, segments in self._brought(flats) for s in segments] for flats in kinds]
            sums.index_add_(1, slots, torch.stack([torch.stack(each) for each in found]))
        self.group.sum(sums).wait()
        return self.agreed(sums)

    def _brought(self, flats: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Segment]]]:
        """Each bucket's tensor, where updates are computed, with the segments in it."""
        for flat, segments in zip(flats, self.segments, strict=True):
            yield self.flat.home.bring(flat), segments

    def agreed(self, sums: Tensor) -> Tensor:
        """[..., slots]: of a table that several stages hold the owner's number, as each has added up in an order of its own."""
        for slot in self.tied:
            theirs = sums[..., slot] * (self.flat.tied.rank == 0)
            self.flat.tied.sum(theirs).wait()
            sums[..., slot] = theirs
        return sums


def packed(segments: Iterable[Segment]) -> list[tuple[Segment, slice]]:
    """Each segment with its place where they lie one behind the other."""
    found, start = list[tuple[Segment, slice]](), 0
    for segment in segments:
        stop = start + segment.place.stop - segment.place.start
        found.append((segment, slice(start, stop)))
        start = stop
    return found


def square(flat: Tensor) -> Tensor:
    """The sum of squares, row by row, then the rows in float64: PyTorch's own float32 sum of 10^8 squares is off by 0.5 %."""
    whole = flat.numel() // ROW * ROW
    exact = torch.promote_types(flat.dtype, torch.float32)
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=exact).double()
    return rows.square().sum() + flat[whole:].double().square().sum()


def _by_matrix(boxes: tuple[Box, ...], place: slice, stacked: bool) -> Iterator[tuple[int, tuple[Box, ...], slice]]:
    """What a range of a part holds of each matrix of its stack: the matrix, its boxes in it, and their place."""
    if not stacked:
        yield 0, boxes, place
        return
    found: dict[int, list[Box]] = {}
    for box in boxes:
        for number in range(box.offset[0], box.offset[0] + box.size[0]):
            found.setdefault(number, []).append(Box(box.offset[1:], box.size[1:]))
    start = place.start
    for number, inner in found.items():
        stop = start + sum(box.count for box in inner)
        yield number, tuple(inner), slice(start, stop)
        start = stop
