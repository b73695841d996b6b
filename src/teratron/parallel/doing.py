"""What a rank is doing, kept where its launcher can read it however the rank ends; and the error of having waited in vain."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for the other ranks."""
ROOM = 512
"""Bytes of the file in which a rank says what it is doing."""
TIMED_OUT = re.compile(r"[Tt]ime(d[ -]?|-)?out")
"""In what gloo and NCCL say of a rank that did not come."""


class Stall(RuntimeError):
    """Other ranks did not come within the time-out; says for what this one waited."""


class Doing:
    """What a rank is at. In a file of a fixed size that is mapped into memory: cheap to change, and there when the process is not."""

    def __init__(self, path: Path | None = None) -> None:
        """path: of the file that is made; None = nobody reads it."""
        self.what, self._memory = "", None
        if path is not None:
            path.write_bytes(bytes(ROOM))
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), ROOM)

    def say(self, what: str) -> None:
        """From now on this."""
        self.what = what
        if self._memory is not None:
            self._memory[:] = what.encode()[:ROOM].ljust(ROOM, b"\0")

    def wait(self, works: Iterable[Any], what: str) -> None:
        """Wait for collectives that are under way. Raises `Stall` where others do not come in time."""
        before = self.what
        self.say(f"{before}, waiting for {what}" if before else f"waiting for {what}")
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            if TIMED_OUT.search(str(error)):
                raise Stall(self.what) from error
            raise
        self.say(before)


def read_doing(path: Path) -> str:
    """What a rank was doing last; "" where it has not said."""
    return path.read_bytes().rstrip(b"\0").decode(errors="ignore") if path.exists() else ""
