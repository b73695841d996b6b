"""How the ranks of one machine find each other, and hand each other the memory that `host` works with. Linux only."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from teratron.parallel.host import Host, Peer


def meet(rank: int, exchange: Callable[[bytes], list[bytes]], timeout: timedelta) -> Host | None:
    """Connect the ranks of a machine; all ranks of all machines call it together. None where there is no other, or no Linux.

    exchange: gives every rank's bytes, in rank order. timeout: how long ranks wait for each other, now and later.
    """
    door = _Door(timeout) if sys.platform == "linux" else None
    found = [text.decode().split() for text in exchange(f"{_machine()} {door.name}".encode() if door else b"- -")]
    machine = found[rank][0]
    names = {other: name for other, (where, name) in enumerate(found) if where == machine and other != rank}
    if door is None or not names:
        return None
    with door.listener:
        connections = {other: door.knock(name, rank) for other, name in names.items() if other < rank}
        while len(connections) < len(names):
            connections |= door.open()
    for connection in connections.values():
        socket.send_fds(connection, [b"outbox"], [door.descriptor])
    peers = {other: Peer(other, connection, _received(connection), timeout) for other, connection in connections.items()}
    return Host(_mapped(door.descriptor), peers)


class _Door:
    """Where the other ranks knock; it has a name, but no file."""

    def __init__(self, timeout: timedelta) -> None:
        self.name, self.timeout = secrets.token_hex(16), timeout
        self.descriptor = os.memfd_create(f"teratron-{os.getpid()}")
        os.ftruncate(self.descriptor, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # pages come when they are written to
        self.listener = self._socket()
        self.listener.bind(f"\0{self.name}")
        self.listener.listen(socket.SOMAXCONN)

    def knock(self, name: str, rank: int) -> socket.socket:
        """At the door of another rank."""
        connection = self._socket()
        connection.connect(f"\0{name}")
        connection.send(rank.to_bytes(8))
        return connection

    def open(self) -> dict[int, socket.socket]:
        """For whoever knocks next: its rank."""
        connection = self.listener.accept()[0]
        connection.settimeout(self.timeout.total_seconds())
        return {int.from_bytes(connection.recv(8)): connection}

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.settimeout(self.timeout.total_seconds())
        return made


def _machine() -> str:
    """The same for processes that can reach each other's doors."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/net')}"


def _received(connection: socket.socket) -> Tensor:
    """The outbox of whoever is at the other end."""
    descriptor = socket.recv_fds(connection, 8, 1)[1][0]
    return _mapped(descriptor)


def _mapped(descriptor: int) -> Tensor:
    """Memory by its descriptor, which is used up: uint8 [bytes]."""
    with open(descriptor, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
