"""Ctrl-C and SIGTERM during training: the first asks to finish the step and save, a second one stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from teratron.parallel.worker import launched, listen, stop_requested, this_worker


class Interrupt:
    """A context in which the first SIGINT or SIGTERM only makes `asked` true, and a second one raises KeyboardInterrupt.

    In a worker of `teratron.parallel.launch`, `asked` is what the launcher has been asked; signals end such a worker as ever, since
    SIGTERM there means that another rank has died.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._former: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether to save and stop. Ranks may learn of it at different steps: they have to agree."""
        return self._signalled or stop_requested()

    def __enter__(self) -> Interrupt:
        if launched():
            listen(True)
            return self
        try:
            self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs there handles signals
            self._former = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if launched():
            listen(False)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        worker = this_worker()
        if worker is not None and worker.rank:
            return  # rank 0 speaks for all
        # Straight to the descriptor: the signal may have come in the middle of a write to a buffered stream.
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving (again = stop at once)\n"
        os.write(2, text.encode())
