"""One piece of work at a time on a thread of its own, beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs an action on a thread; what it raised is raised again by `join`.

    The thread does not keep the process alive: one that has to stop at once leaves the work half done.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether the action still runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the action has raised."""
        return self._error is not None

    def start(self, action: Callable[[], object], name: str) -> None:
        """Begin an action once the former one has ended; raises what that one raised."""
        self.join()
        self._thread = threading.Thread(target=self._run, args=(action,), name=name, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing runs; raises what the last action raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            self._error = error
