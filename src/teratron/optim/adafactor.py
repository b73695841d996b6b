"""Adafactor: of a matrix's second moments only the means of rows and columns are kept (Shazeer and Stern 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from teratron.config import OptimConfig
from teratron.optim.matrices import Segment, packed
from teratron.optim.optimizer import Update
from teratron.optim.segmented import Segmented
from teratron.parallel.boxes import Box, Piece
from teratron.parallel.flat import FlatModel

DECAY = -0.8
"""The second moments' decay rate at update t is 1 - t ** DECAY."""
LARGEST = 1.0
"""Root mean square above which a direction is scaled down."""
LEAST = 1e-3
"""Root mean square that weights are taken to have at least: steps are relative to it."""


class Adafactor(Segmented):
    """The paper's Algorithms 4 and 5, without first moments; `optim.lr` is the relative step size. Vectors keep all second moments.

    Directions are divided by at least `optim.eps`, which takes the place of the paper's 1e-30 on squares: under that, rounding would
    walk weights whose gradient is nothing else. All ranks with the same stages hold all means of rows and columns.
    """

    states: ClassVar = ()

    def __init__(self, flat: FlatModel, config: OptimConfig, seed: int = 0) -> None:
        super().__init__(flat, config, seed)
        self.state = {"moment2": [], "rows": [], "columns": []}
        self.vectors: list[list[tuple[Segment, slice]]] = []
        """Of every trained bucket, with their places in the state."""
        self.starts: dict[int, tuple[int, int]] = {}
        """Where each matrix's rows and columns begin in its bucket's state."""
        for bucket, segments in zip(flat.trained, self.matrices.segments, strict=True):
            self.vectors.append(packed(segment for segment in segments if len(segment.part.shape) == 1))
            rows = columns = 0
            for part in (span.part for span in bucket.spans if len(span.part.shape) > 1):
                first, (height, width) = self.matrices.starts[part.name], part.shape[-2:]
                for slot in range(first, first + (part.shape[0] if len(part.shape) > 2 else 1)):
                    self.starts[slot] = rows, columns
                    rows, columns = rows + height, columns + width
            count = sum(place.stop - place.start for _, place in self.vectors[-1])
            for name, size in (("moment2", count), ("rows", rows), ("columns", columns)):
                self.state[name].append(bucket.gradient.new_zeros(size, dtype=bucket.exact))

    def state_pieces(self, name: str, number: int, flat: Tensor) -> Iterator[Piece]:
        bucket = self.flat.trained[number]
        if name == "moment2":
            for segment, place in self.vectors[number]:
                part = segment.part
                yield Piece(f"{name}/{part.name}", part.shape, segment.boxes, flat[place], part.first and bucket.sharding.copies.rank == 0)
            return
        start = 0
        for part in (span.part for span in bucket.spans if len(span.part.shape) > 1):
            shape = part.shape[:-1] if name == "rows" else (*part.shape[:-2], part.shape[-1])
            whole = Box((0,) * len(shape), shape)
            first = self.matrices.group.rank == 0 and (part.holders == 1 or self.flat.tied.rank == 0)
            yield Piece(f"{name}/{part.name}", shape, (whole,), flat[start : start + whole.count], first)
            start += whole.count

    def turn(self, how: Update) -> None:
        weight = float(how.number) ** DECAY
        for number, bucket in enumerate(self.flat.trained):
            how.clean(bucket.gradient)
            for segment, place in self.vectors[number]:
                gradient, moment2 = bucket.gradient[segment.place], self.state["moment2"][number][place]
                moment2.lerp_(gradient.square(), how.gain(weight, moment2))
                gradient.div_(moment2.sqrt().clamp(min=self.config.eps))
        for number, means in enumerate(self.means()):
            for name, found in zip(("rows", "columns"), means, strict=True):
                state = self.state[name][number]
                state.lerp_(found.to(state.dtype), how.gain(weight, state))
        for number in range(len(self.flat.trained)):
            for segment, box, gradient in self.boxes(number):
                rows, columns = self.held(self.state["rows"][number], self.state["columns"][number], segment.slot)
                across = (rows / rows.mean().clamp(min=torch.finfo(rows.dtype).tiny)).sqrt()[box.slices()[0], None]
                gradient.div_((across * columns.sqrt()[box.slices()[1]]).clamp(min=self.config.eps))

    def boxes(self, number: int) -> Iterator[tuple[Segment, Box, Tensor]]:
        """What is owned of the matrices in a bucket, as rectangles of gradients."""
        for segment in (segment for segment in self.matrices.segments[number] if len(segment.part.shape) > 1):
            values = self.flat.trained[number].gradient[segment.place]
            for box in segment.boxes:
                yield segment, box, values[: box.count].view(box.size)
                values = values[box.count :]

    def held(self, rows: Tensor, columns: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """A matrix's share of what a bucket has for all."""
        (height, width), (row, column) = self.matrices.shapes[slot], self.starts[slot]
        return rows[row : row + height], columns[column : column + width]

    def means(self) -> list[tuple[Tensor, Tensor]]:
        """Means of squares over whole rows and columns, float64, of every trained bucket; one message between the ranks."""
        sizes = [len(self.state[name][number]) for number in range(len(self.flat.trained)) for name in ("rows", "columns")]
        together = torch.zeros(sum(sizes), dtype=torch.float64, device=self.flat.home.device)
        flats = together.split(sizes)
        found = list(zip(flats[::2], flats[1::2], strict=True))
        for number, (rows, columns) in enumerate(found):
            for segment, box, gradient in self.boxes(number):
                squares, (height, width) = gradient.square() / segment.copies, self.matrices.shapes[segment.slot]
                row, column = self.held(rows, columns, segment.slot)
                row[box.slices()[0]] += squares.sum(1, dtype=torch.float64) / width
                column[box.slices()[1]] += squares.sum(0, dtype=torch.float64) / height
        self.matrices.group.sum(together).wait()
        for bucket, pair in zip(self.flat.trained, found, strict=True):
            if any(span.part.holders > 1 for span in bucket.spans):
                for flat in pair:  # the owner's numbers: each stage has added up in an order of its own
                    flat.mul_(self.flat.tied.rank == 0)
                    self.flat.tied.sum(flat).wait()
        return found

    def weigh(self) -> Tensor:
        buckets = self.flat.trained
        squares = self.matrices.squares([bucket.master for bucket in buckets], [bucket.gradient for bucket in buckets])
        counts = [torch.Size(shape).numel() for shape in self.matrices.shapes]
        weights, directions = (squares / torch.tensor(counts, dtype=torch.float64, device=squares.device)).sqrt()
        return weights.clamp(min=LEAST) / (directions / LARGEST).clamp(min=1.0)

    def move(self, weight: Tensor, direction: Tensor, number: Tensor, rate: Tensor, decay: float) -> None:
        weight.mul_(1 - rate * decay).addcmul_(direction, rate * number, value=-1)
