"""Starting a job again: after which ends, how often, and with how many processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PERIOD = 3600.0
"""Seconds without a restart after which they are counted anew."""
FAILED_STARTS = 2
"""In a row with as many processes, after which there may be fewer."""
HANG_TIMEOUT = 540.0
"""Seconds; a minute less than collectives wait."""


@dataclass(frozen=True)
class End:
    """How one attempt to run a job ended."""

    code: int
    """0; 2 after a `UserError`, 130 or 75 after a signal, 141 without a reader; 1 after any other death."""
    message: str = ""
    """What is to be said."""
    rank: int | None = None
    """The rank whose death was the first cause."""
    trained: bool = True
    """Whether it came to a step of training."""
    stopping: bool = False
    """Whether it had been asked to stop."""
    time: float = field(default_factory=time.time)

    @property
    def cause(self) -> str:
        """In one line."""
        line = self.message.partition("\n")[0].removeprefix("teratron: error: ")
        return line.removesuffix("; the other ranks were stopped")


@dataclass(frozen=True)
class Care:
    """What a launcher does for a job beyond starting it once."""

    restarts: int = 0
    """How often it is started again without progress in between."""
    min_nproc: int = 0
    """The fewest processes with which it may go on; 0 = no fewer than it began with."""
    hang_timeout: float = HANG_TIMEOUT
    """Seconds without progress of any rank after which a job in training hangs; 0 = wait for ever."""
    progress: Callable[[], int] = lambda: 0
    """A number that grows with every checkpoint, where the job goes on from."""
    allows: Callable[[int], bool] = lambda nproc: True
    """Whether the layout can be had with so many processes."""
    devices: Callable[[], int] = lambda: 0
    """How many devices there are now, of which each process needs one; 0 = it needs none."""


class Restarts:
    """Decides after each end whether the job starts again, and with how many processes (`nproc`)."""

    def __init__(self, nproc: int, care: Care, clock: Callable[[], float] = time.monotonic) -> None:
        self.nproc, self._care, self._clock = nproc, care, clock
        self._used, self._failed_starts = 0, 0
        self._progress, self._last = care.progress(), clock()

    def fit(self) -> str:
        """Fewer processes where there are fewer devices; returns what is to be said of that."""
        devices = self._care.devices()
        fewer = self._fewer(devices) if 0 < devices < self.nproc else 0
        if not fewer:
            return ""
        line = f"teratron: {in_words(self.nproc)} on a machine with {devices} CUDA device{'s' * (devices > 1)}: going on with {fewer}"
        self.nproc = fewer
        return line

    def after(self, end: End) -> tuple[bool, str]:
        """Whether the job starts again, and what is said of it."""
        allowed = self._care.restarts
        if end.code != 1 or end.stopping or not allowed:
            return False, ""
        self._count(end)
        fewer = self._fewer(self.nproc - 1) if self._failed_starts >= FAILED_STARTS else 0
        if fewer:
            line = f"teratron: {in_words(self.nproc)} came to no step {FAILED_STARTS} times in a row: going on with {fewer}"
            self.nproc, self._used, self._failed_starts = fewer, 0, 0
            return True, line
        if self._used > allowed:
            return False, f"teratron: not started again: --restarts {allowed} without a newer checkpoint in between"
        return True, f"teratron: starting again from the newest checkpoint (restart {self._used} of {allowed})"

    def _count(self, end: End) -> None:
        progress, now = self._care.progress(), self._clock()
        if progress > self._progress or now - self._last > PERIOD:
            self._used = 0
        self._progress, self._last = progress, now
        self._used += 1
        self._failed_starts = 0 if end.trained else self._failed_starts + 1

    def _fewer(self, most: int) -> int:
        """The largest number of processes up to some that may be; 0 = none."""
        if not self._care.min_nproc:
            return 0
        return next((n for n in range(most, self._care.min_nproc - 1, -1) if self._care.allows(n)), 0)


def in_words(nproc: int) -> str:
    return "1 process" if nproc == 1 else f"{nproc} processes"
