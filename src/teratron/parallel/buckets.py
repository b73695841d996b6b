"""Flat buckets: the parameters of a unit in one buffer, their gradients in another; modules hold views (design, section 3).

Replicated and sharded state (ZeRO 1, 2, 3; Rajbhandari et al. 2020) are the same buffers with different lifetimes: each data
rank owns an equal slice of every bucket, and keeps of the rest what `parallel.shard` leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from teratron.config import ParallelConfig
from teratron.models import Part
from teratron.models.leaves import accurate
from teratron.parallel.boxes import Box, Piece, boxes_of
from teratron.parallel.mesh import Group
from teratron.parallel.offload import Home

T = TypeVar("T")
SLICE = 2**20
"""Elements added at once where types differ: PyTorch converts the whole operand first, which then stays in the cache."""


@dataclass(frozen=True)
class Sharding:
    """What data ranks keep, from `parallel.shard`, and how gradients travel."""

    owners: Group
    """The ranks that own a slice each."""
    copies: Group
    """The ranks that own the same slice."""
    keep_gradients: bool = True
    """Whether a whole gradient outlives its reduction."""
    keep_weights: bool = True
    """Whether whole weights outlive their use."""
    wire: torch.dtype | None = None
    """Type in which gradients of half types are summed over ranks; None = float32."""

    @classmethod
    def of(cls, parallel: ParallelConfig, owners: Group, copies: Group, everyone: Group) -> Sharding:
        """everyone: the ranks that hold the same weights, among which owners and copies are drawn up where anything is sharded."""
        sharded = parallel.shard != "none"
        owners, copies = (owners, copies) if sharded else (Group((everyone.ranks[everyone.rank],), 0), everyone)
        alone = owners.size == 1
        return cls(
            owners,
            copies,
            keep_gradients=alone or parallel.shard in ("none", "optimizer"),
            keep_weights=alone or parallel.shard != "parameters",
            wire=torch.bfloat16 if parallel.reduce == "bf16" else None,
        )


@dataclass(frozen=True)
class Span:
    """Where a part lies in a bucket: elements [start, stop)."""

    part: Part
    start: int
    stop: int


class Bucket:
    """Parameters of one unit and type. Those that decay come first.

    `master` is the owned slice that the optimizer updates: float32 for half types, else the weights themselves, unless the optimizer
    wants it otherwise. `gradient` is what it reads: the owned slice of the sum over micro-batches and ranks, float32 for half types
    (`exact`). Frozen parameters have a bucket without gradient, whose master is the weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], parts: Sequence[Part], sharding: Sharding, home: Home) -> None:
        """home: on whose device it lies, and where its master does."""
        self.sharding, self.owners = sharding, sharding.owners
        self.places: dict[str, tuple[int, torch.Size]] = {}
        size = 0
        for name in sorted(parameters, key=lambda name: not decays(parameters[name])):
            self.places[name] = (size, parameters[name].shape)
            size += parameters[name].numel()
        self.share = -(-size // self.owners.size)
        self.own = slice(self.owners.rank * self.share, (self.owners.rank + 1) * self.share)
        self.spans = [self._span(part) for part in parts if part.parameter in self.places]
        self.trained, self.lasting = next(iter(parameters.values())).requires_grad, False
        self._take_over(parameters, home)
        if self.trained:
            self._add_gradients()

    def _span(self, part: Part) -> Span:
        start, shape = self.places[part.parameter]
        start += part.start * shape[1:].numel()
        return Span(part, start, start + torch.Size(part.size).numel())

    def _take_over(self, parameters: Mapping[str, nn.Parameter], home: Home) -> None:
        """Weights and masters, with the values that the parameters have unless they are on the meta device."""
        dtype = next(iter(parameters.values())).dtype
        self.weights = torch.zeros(self.share * self.owners.size, dtype=dtype, device=home.device)
        self.views = {name: self._view(self.weights, name) for name in self.places}
        """Each parameter's part of `weights`."""
        for name, parameter in parameters.items():
            if not parameter.is_meta:
                self.views[name].copy_(parameter.data)
        self.shard = self.weights[self.own] if self.sharding.keep_weights else self.weights[self.own].clone()
        self.exact = accurate(dtype)
        apart = self.trained and self.exact != dtype
        self.master = home.hold(self.shard.to(self.exact)) if apart else self.shard
        if not self.sharding.keep_weights:
            release(self.weights)  # after what stays has found its place: the next bucket then begins in this one's gap

    def _add_gradients(self) -> None:
        exact = self.exact
        self.backward = torch.zeros_like(self.weights)
        """What autograd adds to."""
        self.slopes = {name: self._view(self.backward, name) for name in self.places}
        """Each parameter's part of `backward`."""
        if self.sharding.keep_gradients:
            self.total = self.backward if exact == self.backward.dtype else torch.zeros_like(self.backward, dtype=exact)
            self.gradient = self.total[self.own]
        else:
            self.gradient = torch.zeros(self.share, dtype=exact, device=self.backward.device)
            release(self.backward)

    def _view(self, flat: Tensor, name: str) -> Tensor:
        start, shape = self.places[name]
        return flat[start : start + shape.numel()].view(shape)

    def collect(self) -> None:
        """Move a gradient of half type into the sum over micro-batches."""
        if self.total is not self.backward:
            for total, part in zip(self.total.split(SLICE), self.backward.split(SLICE), strict=True):
                total += part
            self.backward.zero_()

    @property
    def hybrid(self) -> bool:
        """Whether owned slices have copies, over which their gradients are summed as well."""
        return self.owners.size > 1 and self.sharding.copies.size > 1

    def wired(self, gradient: Tensor) -> Tensor:
        """A gradient in the type in which it travels."""
        half = self.exact != self.weights.dtype
        return gradient.to(self.sharding.wire) if half and self.sharding.wire is not None else gradient

    def owned(self) -> Iterator[tuple[Part, tuple[Box, ...], slice]]:
        """What is owned here of each part: its boxes, and their place in the owned slice."""
        for span in self.spans:
            start, stop = max(span.start, self.own.start), min(span.stop, self.own.stop)
            if start < stop:
                boxes = tuple(boxes_of(Box(span.part.offset, span.part.size), start - span.start, stop - span.start))
                yield span.part, boxes, slice(start - self.own.start, stop - self.own.start)

    def pieces(self, kind: str, flat: Tensor) -> Iterator[Piece]:
        """What is owned here of a tensor per part, such as a moment; flat is shaped like the owned slice."""
        for part, boxes, place in self.owned():
            first = part.first and self.sharding.copies.rank == 0
            yield Piece(f"{kind}/{part.name}", part.shape, boxes, flat[place], first, self.lasting)

    def norm_ranges(self) -> list[tuple[slice, int]]:
        """The owned slice's ranges, relative to it, and how many ranks hold the same elements of a model."""
        ranges = [(place, part.copies * part.holders) for part, _, place in self.owned()]
        return merged(ranges)

    def partial_ranges(self) -> dict[int, list[slice]]:
        """Ranges of the whole bucket of whose gradient each of so many neighbouring tensor ranks has a share."""
        found = merged([(slice(span.start, span.stop), span.part.copies) for span in self.spans if span.part.partial])
        return {copies: [place for place, n in found if n == copies] for copies in sorted({n for _, n in found})}


def decays(parameter: Tensor) -> bool:
    """Matrices do, biases and norms do not: Megatron-LM's rule."""
    return parameter.dim() > 1


def release(flat: Tensor) -> None:
    """Give a buffer's memory back; its views stay and are valid again after `restore`."""
    flat.untyped_storage().resize_(0)


def restore(flat: Tensor) -> None:
    """Memory for a released buffer, its content undefined."""
    flat.untyped_storage().resize_(flat.numel() * flat.element_size())


def is_released(flat: Tensor) -> bool:
    return flat.untyped_storage().size() == 0 and flat.numel() > 0


def merged(ranges: Iterable[tuple[slice, T]]) -> list[tuple[slice, T]]:
    """Ranges that touch and have the same mark become one; in their order."""
    found: list[tuple[slice, T]] = []
    for place, mark in sorted(ranges, key=lambda each: each[0].start):
        if found and found[-1][1] == mark and found[-1][0].stop == place.start:
            found[-1] = (slice(found[-1][0].start, place.stop), mark)
        else:
            found.append((place, mark))
    return found
