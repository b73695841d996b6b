"""A map over processes that keeps the order, holds little in flight, and leaves no process behind.

Not `concurrent.futures`: when a process of its pool dies (out of memory) while a large item is on its way, the pool of
Python 3.11 waits forever; and its processes outlive a parent that was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from teratron.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Items in flight for each worker: one being worked on, the others hide the way to it and back."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """The function's results for the items, in their order, computed by `workers` processes (1 = by this one).

    The function is sent to each process once, the items in turn. The processes end when the generator is closed, and when
    this process dies in any way. Exceptions of the function are raised here. Raises `UserError` when a process dies.
    """
    if workers == 1:
        yield from map(function, items)
        return
    crew: list[_Worker] = []
    sent = received = 0
    items = iter(items)
    first = list(islice(items, workers))
    try:
        for _ in first:
            crew.append(_Worker())
        for worker in crew:
            worker.send(function)
        for item in chain(first, items):
            crew[sent % workers].send(item)
            sent += 1
            if sent - received == AHEAD * workers:
                yield crew[received % workers].result()
                received += 1
        while received < sent:
            yield crew[received % workers].result()
            received += 1
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """A process, and this process's end of the pipe to it; when this end closes, the process ends."""

    def __init__(self) -> None:
        # A fresh interpreter: forking a process that has threads (the tokenizer's, the caller's) can freeze it.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # The function travels later, as an item: Python waits for ever with much to tell a process that dies as it starts.
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        # The process inherits that Ctrl-C is not for it: this one hears it, and ends the others. Python's own helper process
        # is started first, because starting it lets Ctrl-C through again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, item: Any) -> None:
        try:
            self._pipe.send(item)
        except OSError:
            raise self._death() from None

    def result(self) -> Any:
        """The next result, or the exception raised in its place."""
        try:
            good, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if not good:
            raise value
        return value

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()

    def _death(self) -> UserError:
        self._process.join()
        return UserError(
            f"a worker process died (exit code {self._process.exitcode}): out of memory, or started by a script without"
            " `if __name__ == '__main__':`; use fewer workers, 1 to use none"
        )


def _serve(pipe: Connection) -> None:
    """What a worker process does: of what it receives the first is the function."""
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(pipe, items), daemon=True).start()
    function = items.get()
    while True:
        try:
            answer = True, function(items.get())
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = False, error
        try:
            pipe.send(answer)
        except OSError:
            os._exit(1)  # nobody is there to read it


def _take(pipe: Connection, items: queue.SimpleQueue[Any]) -> None:
    """Receive items as they come, so that the sender never waits for the one being worked on; end with the sender."""
    try:
        while True:
            items.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)
    except BaseException:  # of unpickling: this process's main module may be another one
        traceback.print_exc()
        os._exit(1)
