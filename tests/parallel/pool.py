"""A pool of processes that are started once and then run any function on any number of ranks, each time as a world of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SIZE = 8
PATIENCE = 240
"""Seconds after which a case hangs."""


class Pool:
    """`run(f, n, *args)` calls f(rank, n, *args) on n ranks with a gloo process group, and returns what they return."""

    def __init__(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "teratron.train.engine"])
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        self.cases = 0
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
        self.cases += 1
        store = Path(self.folder.name) / str(self.cases)
        for rank, pipe in enumerate(self.pipes[:ranks]):
            pipe.send((function.__module__, function.__qualname__, str(store), rank, ranks, args))
        answers = self._answers(ranks)
        failures = [f"rank {rank}: {answer}" for rank, (good, answer) in answers.items() if not good]
        if failures or len(answers) < ranks:
            self.close()
            pool.cache_clear()
            silent = [f"rank {rank}: no answer" for rank in range(ranks) if rank not in answers]
            raise RuntimeError("\n".join(failures + silent))
        return [answers[rank][1] for rank in range(ranks)]

    def _answers(self, ranks: int) -> dict[int, tuple[bool, Any]]:
        """From every rank, or until one has failed: the others may then wait for it for ever."""
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < ranks and all(good for good, _ in answers.values()):
            missing = {self.pipes[rank]: rank for rank in range(ranks) if rank not in answers}
            ready = wait(list(missing), PATIENCE)
            if not ready:
                return answers
            for pipe in ready:
                try:
                    answers[missing[pipe]] = pickle.loads(pipe.recv_bytes())  # type: ignore[index, union-attr]
                except EOFError:
                    answers[missing[pipe]] = False, "died"  # type: ignore[index]
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            _fork(pipe, pipe.recv())


def _fork(pipe: Connection, case: tuple[Any, ...]) -> None:
    """Each case in a child of its own: the threads of its groups would outlive them, and spin."""
    child = os.fork()
    if child == 0:
        pipe.send_bytes(pickle.dumps(_run(*case)))  # plain: tensors by file descriptor would have to be fetched before it ends
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        pipe.send_bytes(pickle.dumps((False, f"died with status {status}")))


def _run(module: str, name: str, store: str, rank: int, ranks: int, args: tuple[Any, ...]) -> tuple[bool, Any]:
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE))
        try:
            return True, getattr(importlib.import_module(module), name)(rank, ranks, *args)
        finally:
            dist.destroy_process_group()
    except BaseException:
        return False, traceback.format_exc()


@functools.cache
def pool() -> Pool:
    """The one pool of this process."""
    return Pool()
