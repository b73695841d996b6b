"""`launch`: start the workers of a run on this machine through torch elastic, supervise them, and say what ended them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from teratron.config import UserError
from teratron.parallel.doing import read_doing
from teratron.parallel.worker import DEFECT, INTERRUPTED, LAUNCHER, LOCALHOST, LOST, STALLED, STOPPED, USER, Record

READER_GONE = 141
"""Exit code of a worker whose standard output nobody reads any more: no error to tell."""
HUNG = "hung-"
"""File of a worker that SIGTERM did not end, with its rank behind."""
STUCK = 4.0
"""Seconds that a worker has to end after SIGTERM."""


def launch(nproc: int, command: Sequence[str]) -> int:
    """Start `nproc` workers of `python *command` on this machine through torch elastic, and wait until all have ended.

    The first death ends all, at once and without saving. SIGINT or SIGTERM asks the workers to save and stop; where none listens
    (`stop_requested`), and the second time, they are ended. What is to be said, the first dead rank's own error, goes to stderr.

    Returns the exit code: 0; 2 after a `UserError`; 130 when stopped by a signal; 1 after any other death. Raises `UserError` for an
    `nproc` below 1. Call it in the main thread.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: expected the number of processes to start on this machine, 1 or more")
    with tempfile.TemporaryDirectory(prefix="teratron-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            with _environment(folder, nproc), _Signals(folder):
                failures = _run_workers(nproc, command)
        except KeyboardInterrupt:
            print("teratron: interrupted", file=sys.stderr)
            return INTERRUPTED
        records = {record.rank: record for record in _records(folder)}
        hung = {int(path.name.removeprefix(HUNG)) for path in folder.glob(f"{HUNG}*")}
        doing = [read_doing(folder / f"doing-{rank}") for rank in range(nproc)]
    if not failures:
        return INTERRUPTED if any(record.kind == STOPPED for record in records.values()) else 0
    message, code = _verdict(nproc, failures, records, hung)
    blamed = _blamed(failures, records)
    if blamed in hung or (blamed in records and records[blamed].kind == STALLED):
        message += "".join(f"\n  rank {rank}: {what or 'between steps'}" for rank, what in enumerate(doing))
    if message:
        print(message, file=sys.stderr)
    return code


def own_command(arguments: Sequence[str]) -> list[str]:
    """The `command` that runs this program again with other arguments, finding its modules where this process did."""
    # `python -m` would look in the current folder first, where a user may have a random.py.
    return [*([] if sys.path[:1] == [os.getcwd()] else ["-P"]), "-m", "teratron", *arguments]


def _run_workers(nproc: int, command: Sequence[str]) -> dict[int, int]:
    """Exit code (or minus the signal) by rank of the workers that failed, the first dead first; empty when all ended well."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch declares it in C++
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Elastic wants a port by number; a server of this process that is there already it shares, so nobody can take the port between.
    server = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"teratron-{os.getpid()}",
        rdzv_backend="static",
        rdzv_endpoint=f"{LOCALHOST}:{server.port}",
        rdzv_configs={"rank": 0},
        local_addr=LOCALHOST,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(os.devnull),  # the workers keep our streams
        signals_to_handle="SIGQUIT",  # SIGINT and SIGTERM are ours, SIGHUP stays as `nohup` leaves it
    )
    try:
        # Elastic replaces ${local_rank} in the arguments, and $$ by $.
        elastic_launch(config, sys.executable)(*(argument.replace("$", "$$") for argument in command))
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


@contextlib.contextmanager
def _environment(folder: Path, nproc: int) -> Iterator[None]:
    """The environment that the workers inherit; what the user has set stays. Meanwhile elastic is quiet, and asks no name server."""
    from teratron.data.pool import cores

    wanted = {"OMP_NUM_THREADS": str(max(1, cores() // nproc)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        wanted["GLOO_SOCKET_IFNAME"] = loopback  # else gloo looks up the machine's name, which may have no address
    former, getfqdn, quiet = os.environ.copy(), socket.getfqdn, logging.root.manager.disable
    os.environ.update({**wanted, **former, LAUNCHER: f"{os.getpid()}:{folder}"})
    socket.getfqdn = lambda name="": name or socket.gethostname()  # elastic asks at every event: many seconds where DNS is silent
    logging.disable()  # elastic's account of a death would come before ours
    try:
        yield
    finally:
        logging.disable(quiet)
        socket.getfqdn = getfqdn
        os.environ.clear()
        os.environ.update(former)


class _Signals:
    """The launcher's signal handlers, as a context.

    The first SIGINT or SIGTERM asks the workers to save and stop; where none listens, and the second time, it raises KeyboardInterrupt.
    `STUCK` seconds after a worker has failed, those that SIGTERM has not ended (stopped by a debugger, hung in a driver) are killed;
    elastic would give them half a minute.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._ending = folder, False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]
        handlers = {signal.SIGINT: self._ask, signal.SIGTERM: self._ask, signal.SIGCHLD: self._wait, signal.SIGALRM: self._kill}
        self._former = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def __exit__(self, *exception: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        stop = self._folder / "stop"
        if stop.exists() or not any(self._folder.glob("listening-*")):
            self._ending = True
            self._wait()
            raise KeyboardInterrupt
        stop.touch()
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving (again = stop at once)\n".encode())

    def _wait(self, *signal_and_frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, STUCK)

    def _kill(self, *signal_and_frame: object) -> None:
        """What a worker writes at its start, it removes at an orderly end: what is left of a gone one means that it failed."""
        workers = [tuple(map(int, path.name.split("-")[1:])) for path in self._folder.glob("process-*")]
        running = [(rank, worker) for rank, worker in workers if _leads_session(worker)]
        if self._ending or len(running) < len(workers):
            for rank, worker in running:
                (self._folder / f"{HUNG}{rank}").touch()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker, signal.SIGKILL)


def _leads_session(process: int) -> bool:
    """Whether the process exists, and leads a session as every worker does."""
    try:
        return os.getsid(process) == process
    except OSError:
        return False


def _records(folder: Path) -> list[Record]:
    return [Record(**json.loads(path.read_text("utf-8"))) for path in folder.glob("rank-*.json")]


def _verdict(nproc: int, failures: Mapping[int, int], records: Mapping[int, Record], hung: Collection[int] = ()) -> tuple[str, int]:
    """What to print, and the exit code, from the exit codes in the order of death and the records, both by rank, and who hung."""
    rank = _blamed(failures, records)
    record, stopped = records.get(rank), "; the other ranks were stopped" if nproc > 1 else ""
    if record is None and failures[rank] == READER_GONE:
        return "", READER_GONE
    if record is None:
        death = "did not answer, others waited for it in vain" if rank in hung else _death(failures[rank])
        return f"teratron: error: rank {rank} {death}{stopped}", 1
    if record.kind == USER:
        same = sorted(other.rank for other in records.values() if (other.kind, other.sentence) == (USER, record.sentence))
        who = "" if len(same) == nproc else f"rank{'s' * (len(same) > 1)} {', '.join(map(str, same))}: "
        return f"teratron: error: {who}{record.sentence}", 2
    if record.kind == STALLED:
        return f"teratron: error: rank {rank} waited in vain for another{stopped}", 1
    return f"teratron: error: rank {rank} raised {record.sentence}{stopped}\n{record.trace.rstrip()}", 1


def _blamed(failures: Mapping[int, int], records: Mapping[int, Record]) -> int:
    """The rank whose death was the first cause: not one that waited in vain or lost a connection, and not one that elastic ended."""
    own = [record for record in records.values() if record.kind in (USER, DEFECT)]
    for place, (rank, code) in enumerate(failures.items()):
        if rank not in records and (place == 0 or code != -signal.SIGTERM):
            return rank
        if rank in records and records[rank].kind not in (STALLED, LOST):
            break
    stalled, lost = ([record for record in records.values() if record.kind == kind] for kind in (STALLED, LOST))
    return min(own or stalled or lost, key=lambda record: record.time).rank


def _death(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"was killed by {name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    return f"was killed by signal {-code}"
