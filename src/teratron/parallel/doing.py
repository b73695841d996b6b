"""What a rank is doing, kept where its launcher can read it however the rank ends; and the error of having waited in vain."""

from __future__ import annotations

import mmap
import re
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for the other ranks."""
HEAD = struct.Struct("<QQ")
"""How often a rank has said something (its heartbeat), and the step of training that it is in; 0 = it does not train."""
ROOM = 512
"""Bytes for what it is doing."""
SLOT = 256
"""Bytes for the last collective of a group."""
GROUPS = 64
"""Slots; what further groups do is not written down."""
TIMED_OUT = re.compile(r"[Tt]ime(d[ -]?|-)?out")
"""In what gloo and NCCL say of a rank that did not come."""


class Stall(RuntimeError):
    """Other ranks did not come within the time-out; says for what this one waited."""


class Doing:
    """What a rank is at. In a file of a fixed size that is mapped into memory: cheap to change, and there when the process is not."""

    def __init__(self, path: Path | None = None) -> None:
        """path: of the file that is made; None = nobody reads it."""
        self.what, self._base, self._memory = "", "", None
        self.waited = 0.0
        """Seconds spent in `wait` so far."""
        self._beats = self._step = 0
        self._slots: dict[str, list[int]] = {}
        """By group: the place of its slot, and how many collectives it had."""
        if path is not None:
            size = HEAD.size + ROOM + GROUPS * SLOT
            path.write_bytes(bytes(size))
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), size)

    def at(self, step: int) -> None:
        """From now on in this step of training; 0 = nobody need expect a heartbeat."""
        self._step = step
        self.say("")

    def say(self, what: str) -> None:
        """From now on this."""
        self._base = what
        self._tell(what)

    def within(self, place: str) -> None:
        """In what was said last, at this place."""
        self._tell(f"{self._base}, {place}")

    def _tell(self, what: str) -> None:
        self.what = what
        self._beats += 1
        if self._memory is not None:
            HEAD.pack_into(self._memory, 0, self._beats, self._step)
            self._write(HEAD.size, ROOM, what)

    def enter(self, group: str) -> None:
        """A group of ranks will have collectives."""
        self._note(group, self._slots.setdefault(group, [len(self._slots), 0]), "")

    def count(self, group: str, what: str) -> str:
        """One more collective of a group; returns its name, such as `#812 all_reduce of float32 [4]`."""
        slot = self._slots[group]
        slot[1] += 1
        self._note(group, slot, what)
        return f"#{slot[1]} {what}"

    def wait(self, works: Iterable[Any], what: str) -> None:
        """Wait for collectives that are under way. Raises `Stall` where others do not come in time."""
        before, begun = self.what, time.perf_counter()
        self._tell(f"{before}, waiting for {what}" if before else f"waiting for {what}")
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            if TIMED_OUT.search(str(error)):
                raise Stall(self.what) from error
            raise
        self._tell(before)
        self.waited += time.perf_counter() - begun

    def _note(self, group: str, slot: list[int], what: str) -> None:
        place, number = slot
        if self._memory is not None and place < GROUPS:
            self._write(HEAD.size + ROOM + place * SLOT, SLOT, f"{number}\n{what}\n{group}")

    def _write(self, start: int, size: int, text: str) -> None:
        assert self._memory is not None
        self._memory[start : start + size] = text.encode()[:size].ljust(size, b"\0")


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    count: int = 0
    step: int = 0
    what: str = ""
    collectives: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By group: how many there were, and the name, type and shape of the last one."""

    @property
    def words(self) -> str:
        what = self.what or "outside of the passes"
        return f"step {self.step}: {what}" if self.step else what


def read_beat(path: Path) -> Beat:
    """What a rank said last; nothing where it has not said anything."""
    data = path.read_bytes() if path.exists() else b""
    if len(data) < HEAD.size + ROOM:
        return Beat()
    texts = [_text(data[HEAD.size : HEAD.size + ROOM])]
    texts += [_text(data[start : start + SLOT]) for start in range(HEAD.size + ROOM, len(data), SLOT)]
    slots = [text.split("\n") for text in texts[1:] if text.count("\n") == 2]
    count, step = HEAD.unpack_from(data)
    return Beat(count, step, texts[0], {group: (int(number), what) for number, what, group in slots})


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="ignore")
