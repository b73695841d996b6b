"""Whole matrices of which many ranks hold pieces: each is put together on one rank, worked on, and its pieces sent back (contract C11)."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teratron.optim.matrices import Matrices, Segment
from teratron.parallel.boxes import Box


@dataclass(frozen=True)
class Holding:
    """What a rank has of a matrix."""

    slot: int
    first: bool
    """Whether it is the first of those that have the same."""
    boxes: tuple[Box, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return sum(box.count for box in self.boxes)


class Ownership:
    """Who works on which matrix: the longest work first, each to the rank that has the least so far."""

    def __init__(self, matrices: Matrices, whole: Callable[[Segment], bool], cost: Callable[[tuple[int, ...]], float]) -> None:
        """whole: which matrices are concerned; cost: of the work on a shape. All ranks with the same stages make one together."""
        self.matrices, self.group = matrices, matrices.group
        self.mine = [(number, s) for number, segments in enumerate(matrices.segments) for s in segments if whole(s)]
        """Buckets' numbers with what is held in them."""
        told = [(s.slot, s.first, [(box.offset, box.size) for box in s.boxes]) for _, s in self.mine]
        self.held = [list(_holdings(text)) for text in self.group.gather_bytes(json.dumps(told).encode())]
        """Of every rank of the group, in the order in which it sends and receives."""
        slots = sorted({holding.slot for held in self.held for holding in held})
        self.owner = deal({slot: cost(matrices.shapes[slot]) for slot in slots}, self.group.size)
        own = dict.fromkeys(slots, 0)
        for rank, held in enumerate(self.held):
            for holding in held:
                own[holding.slot] += holding.count * (self.owner[holding.slot] == rank)
        self.at_home = {slot for slot in slots if own[slot] == math.prod(matrices.shapes[slot])}
        """Matrices that their owner holds all of."""

    def change(self, values: Sequence[Tensor], dtype: torch.dtype, work: Callable[[Tensor], Tensor]) -> None:
        """Put work(matrices) in the place of the matrices; all ranks with the same stages together.

        values: a tensor for every trained bucket, shaped like its owned slice. dtype: in which numbers travel and are worked on.
        work: [batch, rows, columns] -> the same shape.
        """
        matrices = self._collect(values, dtype)
        shapes = sorted({matrix.shape for matrix in matrices.values()})
        for shape in shapes:
            slots = [slot for slot, matrix in matrices.items() if matrix.shape == shape]
            matrices |= dict(zip(slots, work(torch.stack([matrices[slot] for slot in slots])), strict=True))
        self._spread(values, matrices, dtype)

    def _collect(self, values: Sequence[Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """This rank's matrices, from the pieces of all."""
        me, ranks = self.group.rank, range(self.group.size)
        sent = [[values[number][s.place] for number, s in self.mine if self._sends(me, s.slot, s.first, to)] for to in ranks]
        came = [[h for h in self.held[rank] if self._sends(rank, h.slot, h.first, me)] for rank in ranks]
        arrived = self._exchange(sent, [sum(h.count for h in held) for held in came], values[0].device, dtype)
        device = values[0].device
        matrices = {s: torch.empty(self.matrices.shapes[s], dtype=dtype, device=device) for s, to in self.owner.items() if to == me}
        for holding in (holding for held in came for holding in held):
            for box in holding.boxes:
                matrices[holding.slot][box.slices()] = arrived[: box.count].view(box.size)
                arrived = arrived[box.count :]
        return matrices

    def _sends(self, rank: int, slot: int, first: bool, to: int) -> bool:
        """Whether a rank's piece of a matrix goes to a rank: to the owner, from one of those that have it."""
        return self.owner[slot] == to and (rank == to if slot in self.at_home else first)

    def _spread(self, values: Sequence[Tensor], matrices: dict[int, Tensor], dtype: torch.dtype) -> None:
        """Every rank's pieces of the matrices back to it."""
        ranks = range(self.group.size)
        pieces = [[matrices[h.slot][box.slices()] for h in self.held[rank] if h.slot in matrices for box in h.boxes] for rank in ranks]
        back = [[(number, s) for number, s in self.mine if self.owner[s.slot] == rank] for rank in ranks]
        sizes = [sum(s.place.stop - s.place.start for _, s in held) for held in back]
        arrived = self._exchange(pieces, sizes, values[0].device, dtype)
        for number, segment in (pair for held in back for pair in held):
            count = segment.place.stop - segment.place.start
            values[number][segment.place] = arrived[:count]
            arrived = arrived[count:]

    def _exchange(self, sent: list[list[Tensor]], came: list[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Each rank's list of tensors to it; what comes is one flat tensor, in rank order."""
        flat = [piece.reshape(-1).to(dtype) for pieces in sent for piece in pieces]
        x = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
        out = torch.empty(sum(came), dtype=dtype, device=device)
        self.group.exchange(out, x, came, [sum(piece.numel() for piece in pieces) for pieces in sent]).wait()
        return out


def deal(costs: dict[int, float], ranks: int) -> dict[int, int]:
    """A rank for every slot, so that costs are even: the dearest first, each to the rank that has the least so far."""
    loads = [(0.0, rank) for rank in range(ranks)]
    owner = {}
    for slot in sorted(costs, key=lambda slot: (-costs[slot], slot)):
        load, rank = heapq.heappop(loads)
        owner[slot] = rank
        heapq.heappush(loads, (load + costs[slot], rank))
    return owner


def _holdings(text: bytes) -> Iterator[Holding]:
    for slot, first, boxes in json.loads(text):
        yield Holding(slot, first, tuple(Box(tuple(offset), tuple(size)) for offset, size in boxes))
