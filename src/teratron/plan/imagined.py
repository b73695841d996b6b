"""A mesh of which only one rank exists: its collectives return at once and tell a meter what they would have sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from teratron.parallel import mesh
from teratron.parallel.mesh import Group, Pending
from teratron.plan.layout import PaperMesh
from teratron.plan.meter import COMMUNICATION, Meter


@dataclass(frozen=True)
class ImaginedGroup(Group):
    """What a collective writes keeps the content that it had."""

    meter: Meter = field(default_factory=Meter)

    def _start(self, collective: Any, *tensors: Any, **options: Any) -> Pending:
        if self.size == 1:
            return Pending()
        x, others = tensors[-1], (self.size - 1) / self.size
        if collective is dist.all_reduce:
            self._tell("all-reduce", x, 2 * others)
        elif collective is mesh._gather:
            self._tell("all-gather", tensors[0], others, *tensors)
        elif collective is mesh._scatter_sum:
            self._tell("reduce-scatter", x, others, *tensors)
        else:
            rows = options.get("input_split_sizes")
            share = others if rows is None else 1 - rows[self.rank] / max(1, sum(rows))
            self._tell("all-to-all", x, share, *tensors)
        return Pending()

    def gather_bytes(self, text: bytes) -> list[bytes]:
        """All say what this rank says."""
        return [text] * self.size

    def send(self, x: Tensor, peer: int) -> Pending:
        self._tell("send", x, 1)
        return Pending()

    def receive(self, out: Tensor, peer: int) -> Pending:
        self._tell("receive", out, 0)
        return Pending()

    def shift(self, out: Tensor, x: Tensor) -> Pending:
        if self.size == 1:
            return super().shift(out, x)
        self._tell("shift", x, 1, out, x)
        return Pending()

    def _tell(self, what: str, whole: Tensor, share: float, *buffers: Tensor) -> None:
        """share: of the whole tensor, that this rank sends; buffers: that are there for the sake of the message."""
        size = whole.numel() * whole.element_size()
        self.meter.message(what, self.axes, self.size, size, share * size)
        self.meter.label(COMMUNICATION, buffers)


@dataclass
class ImaginedMesh(PaperMesh):
    """One rank of a mesh of any size, whose groups tell `meter`."""

    meter: Meter = field(default_factory=Meter)

    def _group(self, key: tuple[Any, ...], lines: Iterable[list[int]], own: bool = False) -> Group:
        if key not in self._groups:
            found = super()._group(key, lines, own)
            self._groups[key] = ImaginedGroup(found.ranks, found.rank, None, name_of(key), meter=self.meter)
        return self._groups[key]


def name_of(key: tuple[Any, ...]) -> str:
    """The axes of a group for people, from the mesh's key of it."""
    if "experts" in key or "copies" in key:
        return "expert" if "experts" in key else "copies of experts"
    return " x ".join(axis for axis in key if axis in mesh.AXES)
