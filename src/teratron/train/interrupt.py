"""Requests to stop: the first asks to finish the step and save, a second one stops at once; and the time that a run may take."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from teratron.parallel.worker import ENDING, PREEMPTED, answer, launched, listen, stop_requested, stops_at_once, this_worker


class Interrupt:
    """A context in which the first signal of `ENDING` only sets `asked`, and one that then `stops_at_once` raises KeyboardInterrupt.

    In a worker of `teratron.parallel.launch`, `asked` is what the launcher has been asked; signals end such a worker as ever, since
    SIGTERM there means that another rank has died.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        """minutes: after which to stop by itself; 0 = never."""
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._first = 0
        self._former: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> int:
        """0, or the exit code with which to save and stop. Ranks may learn of it at different steps: they have to agree."""
        late = time.monotonic() > self._deadline
        return ENDING[signal.Signals(self._first)] if self._first else stop_requested() or (PREEMPTED if late else 0)

    def __enter__(self) -> Interrupt:
        if launched():
            listen(True)
            return self
        try:
            self._former = {number: signal.signal(number, self._handle) for number in ENDING}
        except ValueError:  # not the main thread: whoever runs there handles signals
            self._former = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if launched():
            listen(False)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first:
            if stops_at_once(self._first, number):
                raise KeyboardInterrupt
            return
        self._first = number
        worker = this_worker()
        if worker is None or not worker.rank:  # rank 0 speaks for all
            answer(number)
