"""Ctrl-C and SIGTERM during training: the first asks to finish the step and save, a second one stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """A context in which the first SIGINT or SIGTERM only sets `asked`, and a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        try:
            self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs there handles signals
            self._former = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Straight to the descriptor: the signal may have come in the middle of a write to a buffered stream.
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving (again = stop at once)\n"
        os.write(2, text.encode())
