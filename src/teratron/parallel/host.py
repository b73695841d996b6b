"""Collectives between the processes of one machine, through memory that all of them read: nothing passes through the system's network.

Every rank has an outbox, anonymous memory that the others were handed. A collective puts what a rank brings into its outbox and tells the
others by a socket where it lies; whoever waits takes it from there, in rank order. Nothing has a name on disk, so killed processes leave
nothing behind, and a process that ends closes its sockets: the others notice at once, as they do through gloo.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import blake2b

import torch
from torch import Tensor

MESSAGE = struct.Struct("<8sQQ")
"""Which collective; the first byte of what is brought to it; how many messages of the receiver the sender is done with."""
GRAIN = 64
"""What lies in an outbox begins at multiples of so many bytes."""


class Peer:
    """Another rank of this machine."""

    def __init__(self, rank: int, connection: socket.socket, outbox: Tensor, timeout: timedelta) -> None:
        self.rank, self.outbox, self._connection, self._timeout = rank, outbox, connection, timeout
        seconds = struct.pack("ll", int(timeout.total_seconds()), timeout.microseconds)
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        self.sent = self.taken = 0
        """Messages to it; those of them with which it is done."""
        self._came = self._done = 0
        """Messages from it; those of them before the first with which we are not done."""
        self._done_early: set[int] = set()
        self._letters: dict[bytes, tuple[int, int]] = {}
        """By collective: the number of the message, and the first byte in its outbox."""

    def fileno(self) -> int:
        return self._connection.fileno()

    def tell(self, collective: bytes, first: int) -> None:
        trouble = ""
        try:
            self._connection.send(MESSAGE.pack(collective, first, self._done))
        except OSError as error:
            trouble = str(error)
        if trouble:  # raised out here, so that it is the first error of its chain
            raise RuntimeError(f"connection closed by rank {self.rank}: {trouble}")
        self.sent += 1

    def has_told(self, collective: bytes) -> bool:
        return collective in self._letters

    def letter(self, collective: bytes) -> tuple[int, int]:
        """What it tells of a collective; waits for it. Raises RuntimeError where it does not come in time, or is gone."""
        while not self.has_told(collective):
            self.hear()
        return self._letters.pop(collective)

    def hear(self) -> None:
        """Take the next message."""
        trouble, message = "", b""
        try:
            message = self._connection.recv(MESSAGE.size)
        except BlockingIOError:
            trouble = f"timed out: rank {self.rank} has told nothing for {self._timeout.total_seconds():g} s"
        except OSError as error:
            trouble = f"connection closed by rank {self.rank}: {error}"
        if not message:
            raise RuntimeError(trouble or f"connection closed by rank {self.rank}")
        collective, first, self.taken = MESSAGE.unpack(message)
        self._letters[collective] = self._came, first
        self._came += 1

    def done(self, number: int) -> None:
        """With a message: what it told of may be overwritten. The peer learns so with our next message."""
        self._done_early.add(number)
        while self._done in self._done_early:
            self._done_early.remove(self._done)
            self._done += 1


@dataclass
class Slot:
    """A range of bytes of the own outbox."""

    first: int
    stop: int
    readers: list[tuple[Peer, int]] = field(default_factory=list)
    """Peers, and how many messages each must be done with before this can be used again."""
    held: bool = True
    """Whether this rank is still to read it."""

    @property
    def free(self) -> bool:
        return not self.held and all(peer.taken >= count for peer, count in self.readers)


class Host:
    """This rank's outbox, and the other ranks of its machine."""

    def __init__(self, outbox: Tensor, peers: dict[int, Peer]) -> None:
        self.outbox, self.peers = outbox, peers
        self._slots: list[Slot] = []
        self._poll = select.poll()
        self._by_descriptor = {peer.fileno(): peer for peer in peers.values()}
        for descriptor in self._by_descriptor:
            self._poll.register(descriptor, select.POLLIN)

    def line(self, ranks: Sequence[int], rank: int) -> Line | None:
        """The line of some ranks, of which ours is the rank-th; None where not all of them are here."""
        others = {place: self.peers[number] for place, number in enumerate(ranks) if number in self.peers}
        return Line(self, rank, others) if len(others) == len(ranks) - 1 else None

    def hear(self) -> None:
        """Take all messages that are there, so that no socket fills up and slots become free.

        Who has ended does no harm to those that do not wait for it: they may have more to do.
        """
        while ready := self._poll.poll(0):
            for descriptor, _ in ready:
                try:
                    self._by_descriptor[descriptor].hear()
                except RuntimeError:
                    self._poll.unregister(descriptor)

    def slot(self, size: int) -> Slot:
        """Room for so many bytes, in the first gap that is large enough."""
        self._slots = [slot for slot in self._slots if not slot.free]
        first = place = 0
        for slot in self._slots:
            if slot.first - first >= size:
                break
            first, place = -(-slot.stop // GRAIN) * GRAIN, place + 1
        if first + size > len(self.outbox):
            raise RuntimeError(f"{size} bytes for other ranks do not fit beside {first} that they have not fetched yet")
        self._slots.insert(place, Slot(first, first + size))
        return self._slots[place]


@dataclass(frozen=True)
class Line:
    """A group of ranks on one machine, and its collectives; `what` names each, alike on all ranks and unlike any other."""

    host: Host
    rank: int
    """This rank's place."""
    others: dict[int, Peer]
    """By their places."""

    def sum(self, what: str, out: Tensor, x: Tensor | None = None) -> Shared:
        """The sum in rank order, in place or of x in `out`."""
        return self._reduce(what, torch.add, out, out if x is None else x)

    def max(self, what: str, x: Tensor) -> Shared:
        """The elementwise maximum, in place."""
        return self._reduce(what, torch.maximum, x, x)

    def _reduce(self, what: str, join: Callable[..., Tensor], out: Tensor, x: Tensor) -> Shared:
        return self._start(what, self._put(x), x, lambda pieces: _join(join, pieces, out))

    def gather(self, what: str, out: Tensor, x: Tensor) -> Shared:
        """Every rank's x, one behind the other along dimension 0 of `out`, whose place of this rank x may be."""

        def take(pieces: list[Tensor]) -> None:
            for place, target in enumerate(out.chunk(len(pieces))):
                if place != self.rank:
                    target.copy_(pieces[place].view(target.shape))
                elif target.data_ptr() != x.data_ptr():
                    target.copy_(x.view(target.shape))

        return self._start(what, self._put(x), x, take)

    def scatter_sum(self, what: str, out: Tensor, x: Tensor) -> Shared:
        """The sum in rank order of the ranks' pieces for this one along dimension 0, in `out`."""

        def take(pieces: list[Tensor]) -> None:
            pieces[self.rank] = x
            _join(torch.add, [piece.chunk(len(pieces))[self.rank].view(out.shape) for piece in pieces], out)

        return self._start(what, self._put(x, self.others), x, take)

    def _put(self, x: Tensor, places: Iterable[int] | None = None) -> Slot:
        """x into the outbox; places: only the pieces along dimension 0 for these ranks, None = all."""
        self.host.hear()
        slot = self.host.slot(x.numel() * x.element_size())
        laid = _view(self.host.outbox, slot.first, x)
        if places is None:
            laid.copy_(x)
        else:
            ranks = len(self.others) + 1
            for place in places:
                laid.chunk(ranks)[place].copy_(x.chunk(ranks)[place])
        return slot

    def _start(self, what: str, slot: Slot, x: Tensor, take: Callable[[list[Tensor]], None]) -> Shared:
        """Tell the others what lies there; take: is given what all ranks brought, in rank order, with the shape of x."""
        collective = blake2b(what.encode(), digest_size=8).digest()
        for peer in self.others.values():
            peer.tell(collective, slot.first)
            slot.readers.append((peer, peer.sent))
        return Shared(self, collective, slot, x, take)


@dataclass(frozen=True)
class Shared:
    """A collective that is under way."""

    line: Line
    collective: bytes
    slot: Slot
    x: Tensor
    take: Callable[[list[Tensor]], None]

    def is_completed(self) -> bool:
        """Whether `wait` would not wait for anybody."""
        self.line.host.hear()
        return all(peer.has_told(self.collective) for peer in self.line.others.values())

    def wait(self) -> None:
        """Raises RuntimeError where another rank does not come in time, or is gone."""
        line = self.line
        letters = [(place, peer, *peer.letter(self.collective)) for place, peer in line.others.items()]
        pieces = {line.rank: _view(line.host.outbox, self.slot.first, self.x)}
        pieces |= {place: _view(peer.outbox, first, self.x) for place, peer, _, first in letters}
        self.take([pieces[place] for place in range(len(pieces))])
        for _, peer, number, _ in letters:
            peer.done(number)
        self.slot.held = False


def _join(join: Callable[..., Tensor], pieces: Sequence[Tensor], out: Tensor) -> None:
    join(*pieces[:2], out=out)
    for piece in pieces[2:]:
        join(out, piece, out=out)


def _view(outbox: Tensor, first: int, like: Tensor) -> Tensor:
    """What lies in an outbox from a byte on, as a tensor of this type and shape."""
    return outbox[first : first + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
