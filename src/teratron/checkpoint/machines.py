"""Files that lie in the memory of several machines: who holds which, and how they come from one to another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from teratron.checkpoint.agree import agree, gather_json
from teratron.config import UserError
from teratron.parallel.mesh import Group
from teratron.parallel.worker import Worker

_BLOCK = 2**24
"""Bytes sent at once."""


@dataclass(frozen=True)
class Machines:
    """How the ranks lie on machines, each with a file system of its own: as many on each, one machine after the other."""

    rank: int
    ranks: int
    each: int
    """Ranks on a machine; 0 = not as many on each, so that their memory is not used."""

    @property
    def several(self) -> bool:
        return 0 < self.each < self.ranks

    @property
    def leads(self) -> bool:
        """Whether this rank is the first on its machine."""
        return self.each > 0 and self.rank % self.each == 0

    def of(self, rank: int) -> int:
        """The machine of a rank."""
        return rank // self.each

    def share(self, names: Iterable[str]) -> list[str]:
        """Of the files on this machine those that this rank looks after."""
        return sorted(names)[self.rank % self.each :: self.each]

    def elsewhere(self) -> list[int]:
        """The ranks whose files are not on this machine: it holds those of its own and of the machine before."""
        count = self.ranks // self.each
        return [rank for rank in range(self.ranks) if (self.of(self.rank) - self.of(rank)) % count > 1]

    def copies(self, written: Sequence[dict[str, dict[str, int]]]) -> list[Delivery]:
        """What each rank has written, by name with its `bytes`, goes to the same rank of the next machine."""
        order = sorted(range(self.ranks), key=lambda rank: self.of(rank) % 2)  # every second machine sends while the others receive
        return [
            Delivery(name, entry["bytes"], rank, (rank + self.each) % self.ranks) for rank in order for name, entry in written[rank].items()
        ]


class Delivery(NamedTuple):
    """A file that goes from one rank's machine to another's."""

    name: str
    bytes: int
    source: int
    target: int


def find_machines(group: Group, worker: Worker | None) -> Machines:
    """How all ranks lie on machines; a collective."""
    mine = [worker.local_rank, worker.local_world] if worker is not None else [group.rank, group.size]
    found = gather_json(group, mine)
    each = int(found[0][1])
    even = group.size % each == 0 and all(place == [rank % each, each] for rank, place in enumerate(found))
    return Machines(group.rank, group.size, each if even else 0)


def deliver(folder: Path, deliveries: Sequence[Delivery], group: Group) -> None:
    """Copy files of a folder of this name on one machine into that on another; a collective of all ranks, with the same deliveries.

    Raises the same `UserError` on all ranks where one has no room; that what came is what was sent is the caller's to verify.
    """

    def pass_all() -> None:
        for one in deliveries:  # in the same order everywhere, so that no two ranks wait for each other
            if group.rank in (one.source, one.target):
                _pass(folder / one.name, one, group)

    agree(group, lambda: _reserve(folder, [one for one in deliveries if one.target == group.rank]))
    agree(group, pass_all)  # the other ranks of a machine, too, find all that came


def _reserve(folder: Path, expected: Iterable[Delivery]) -> None:
    """Take the room for what will come: the sender would wait for ever for a receiver that cannot write."""
    for one in expected:
        path = folder / one.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                if one.bytes:
                    os.posix_fallocate(file.fileno(), 0, one.bytes)
        except OSError as error:
            raise UserError(f"{path}: no copy of {one.bytes:,} bytes can be kept here: {error.strerror or error}") from None


def _pass(path: Path, delivery: Delivery, group: Group) -> None:
    sends = group.rank == delivery.source
    with path.open("rb" if sends else "r+b") as file:
        for start in range(0, delivery.bytes, _BLOCK):
            block = torch.empty(min(_BLOCK, delivery.bytes - start), dtype=torch.uint8)
            if sends:
                file.readinto(block.numpy())  # type: ignore[attr-defined]
                group.send(block, delivery.target).wait()
            else:
                group.receive(block, delivery.source).wait()
                file.write(block.numpy().data)
