"""Ranks as forks of one process that has imported everything: a run costs a second, not the ten that starting Python takes.

Each rank is a real process that joins the others as under torchrun, and may be struck: by something it does when it comes to a place,
or after so many function calls.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 300
"""Seconds after which ranks are killed that should have ended."""
EVERY = -1
"""In place of a rank: all of them."""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
PRELOADED = (
    "safetensors.torch",
    "tokenizers",
    "torch.distributed",
    "teratron.cli.train",
    "teratron.train.report",
    "teratron.train.trainer",
    "teratron.tasks.watch",
)
SETUP = "setup"
"""In place of a place: before anything else is done."""


def blow(rank: int, place: str, call: int = 1, deed: str = KILL) -> dict[str, Any]:
    """Let a rank do a deed (code) before it does the n-th call of `module:attribute`, or before anything (`SETUP`)."""
    return {"rank": rank, "place": place, "call": call, "deed": deed}


def killed_after(rank: int, calls: int) -> dict[str, Any]:
    """SIGKILL once the rank's main thread has made so many function calls of any kind."""
    return {"rank": rank, "calls": calls}


def counted(rank: int, file: Path) -> dict[str, Any]:
    """Let a rank write down how many function calls it makes."""
    return {"rank": rank, "calls": 1 << 60, "file": str(file)}


@dataclass(frozen=True)
class End:
    """How the ranks of a run ended: their exit codes (or minus the signal), and what each has printed."""

    codes: list[int]
    said: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.said)


class Server:
    """Runs command lines on forks of one process, one at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        atexit.register(self._process.kill)

    def run(self, ranks: int, command: list[str], folder: Path, blows: Iterable[dict[str, Any]] = ()) -> End:
        """Run `teratron COMMAND` on so many ranks, and wait until all have ended; what they print goes into the folder.

        As under a launcher the others are killed when one has died of a signal.
        """
        job = {"ranks": ranks, "command": command, "folder": str(folder), "blows": list(blows)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return End(codes, [(folder / f"said-{rank}").read_text("utf-8", "replace") for rank in range(ranks)])


@functools.cache
def server() -> Server:
    """The one server of this process."""
    return Server()


def serve() -> None:
    """Fork the ranks of each job that stands on a line of standard input."""
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        store, port = _store()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        where |= {"WORLD_SIZE": str(job["ranks"])}
        codes = _wait([_fork(functools.partial(_rank, job, rank, where)) for rank in range(job["ranks"])])
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)
        print(json.dumps(codes), flush=True)


def _store() -> tuple[int, int]:
    """A process, and the port of its store, where the ranks of a job meet: this process must have no thread when it forks."""
    reading, writing = os.pipe()

    def keep() -> None:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        signal.pause()

    store = _fork(keep)
    os.close(writing)
    with os.fdopen(reading) as told:
        return store, int(told.readline())


def _fork(body: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the server dies
        body()
        os._exit(0)
    return process


def _wait(processes: list[int]) -> list[int]:
    handles = {os.pidfd_open(process): rank for rank, process in enumerate(processes)}
    codes = [0] * len(processes)
    while handles:
        ended = select.select(list(handles), [], [], PATIENCE)[0]
        for handle in ended:
            rank = handles.pop(handle)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(processes[rank], 0)[1])
            os.close(handle)
        if not ended or min(codes) < 0:
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
    return codes


def _rank(job: dict[str, Any], rank: int, where: dict[str, str]) -> None:
    """All that a rank does."""
    said = os.open(f"{job['folder']}/said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    if job["ranks"] > 1:
        os.environ.update({**where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    sys.argv = ["teratron", *job["command"]]
    from teratron.cli.main import main
    from teratron.train import trainer

    trainer.measure_peak = lambda device, dtype: 1e11  # type: ignore[assignment]  # a third of a second each time
    for what in job["blows"]:
        if what["rank"] in (rank, EVERY):
            _prepare(what, job["folder"])
    code = main()
    sys.setprofile(None)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _prepare(what: dict[str, Any], folder: str) -> None:
    if "calls" in what:
        _count(what["calls"], what.get("file"))
    elif what["place"] == SETUP:
        exec(what["deed"], {"os": os, "signal": signal, "folder": folder})
    else:
        _strike(what, folder)


def _count(calls: int, file: str | None) -> None:
    left = [calls]

    def step(frame: Any, event: str, argument: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)
    if file is not None:
        atexit.register(lambda: Path(file).write_text(str(calls - left[0])))


def _strike(what: dict[str, Any], folder: str) -> None:
    module, _, path = what["place"].partition(":")
    *holders, name = path.split(".")
    holder = functools.reduce(getattr, holders, importlib.import_module(module))
    original, left = getattr(holder, name), [what["call"]]

    @functools.wraps(original)
    def struck(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            exec(what["deed"], {"os": os, "signal": signal, "folder": folder, "args": args})
        return original(*args, **kwargs)

    setattr(holder, name, struck)


if __name__ == "__main__":
    serve()
