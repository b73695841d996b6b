"""A map over processes that keeps the order, holds little in flight, and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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

    The function is sent to each process once. The processes end when the iterator is closed, and when this process dies in
    any way. Exceptions of the function are raised here. Raises `UserError` when a process dies.
    """
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    pool = ProcessPoolExecutor(workers, context, _start, (function, theirs))
    flying: deque[Future[Any]] = deque()
    try:
        for item in items:
            flying.append(_submit(pool, item))
            if len(flying) >= AHEAD * workers:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process of {workers} died: out of memory, or started from a script without `if __name__ == '__main__':`;"
            " use fewer workers, 1 to use none"
        ) from None
    finally:
        if flying:
            ours.close()  # nobody wants what the processes still work on
        pool.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()


def _submit(pool: ProcessPoolExecutor, item: Any) -> Future[Any]:
    """Hand an item to the pool, whose processes inherit that Ctrl-C is for this one alone to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_function: Callable[[Any], Any]
"""What a worker process applies; it has no other way to keep what it was sent at its start."""


def _start(function: Callable[[Any], Any], parent: Connection) -> None:
    global _function
    _function = function
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Wait for the other end of the pipe, which only the parent holds, to be closed: by it, or because it is no more."""
    try:
        parent.recv()
    except (EOFError, OSError):
        os._exit(1)


def _work(item: Any) -> Any:
    return _function(item)
