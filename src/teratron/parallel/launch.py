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
from teratron.parallel.hangs import Watchdog, account, differences, kill, leads_session, workers
from teratron.parallel.restart import Care, End, Restarts
from teratron.parallel.worker import (
    DEFECT,
    ENDING,
    INTERRUPTED,
    LAUNCHER,
    LOCALHOST,
    LOST,
    RESTARTS,
    STALLED,
    STOP,
    STOPPED,
    USER,
    Record,
    answer,
    stops_at_once,
)

READER_GONE = 141
"""Exit code of a worker whose standard output nobody reads any more: no error to tell."""
HUNG = "hung-"
"""File of a worker that SIGTERM did not end, with its rank behind."""
STUCK = 4.0
"""Seconds that a worker has to end after SIGTERM."""


def launch(nproc: int, command: Sequence[str], care: Care | None = None, run: Path | None = None) -> int:
    """Start `nproc` workers of `python *command` on this machine through torch elastic, and wait until all have ended.

    The first death ends all, at once and without saving. A signal of `ENDING` asks the workers to save and stop; where none listens
    (`stop_requested`), and the second time, they are ended. What is to be said, the first dead rank's own error, goes to stderr.

    Args: care: whether they are started again then, and when they hang. run: the folder that gets the stacks of those that hang.
    Returns the exit code: 0; 2 after a `UserError`; 130 or 75 (`ENDING`) when stopped by a signal; 1 after any other death. Raises
    `UserError` for an `nproc` below 1. Call it in the main thread.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: expected the number of processes to start on this machine, 1 or more")
    care = care or Care()
    restarts, untold = Restarts(nproc, care), list[dict[str, Any]]()
    try:
        while True:
            _tell(restarts.fit())
            end = _attempt(restarts.nproc, command, care.hang_timeout, run, untold)
            _tell(end.message)
            again, line = restarts.after(end)
            _tell(line)
            if not again:
                return end.code
            untold.append({"time": end.time, "rank": end.rank, "cause": end.cause})
    except KeyboardInterrupt:
        _tell("teratron: interrupted")
        return INTERRUPTED


def _tell(line: str) -> None:
    if line:
        with contextlib.suppress(OSError):  # nobody reads any more: what is to be done is done all the same
            print(line, file=sys.stderr, flush=True)


def _attempt(nproc: int, command: Sequence[str], hang_timeout: float, run: Path | None, untold: list[dict[str, Any]]) -> End:
    """Run the job once. untold: restarts of which the run is to take note; those that it did are taken from the list."""
    with tempfile.TemporaryDirectory(prefix="teratron-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if untold:
            (folder / RESTARTS).write_text(json.dumps(untold), "utf-8")
        with _environment(folder, nproc), _Signals(folder), Watchdog(folder, nproc, hang_timeout, run) as watchdog:
            failures = _run_workers(nproc, command)
        if not (folder / RESTARTS).exists():
            untold.clear()
        records = {record.rank: record for record in _records(folder)}
        beats = watchdog.beats()
        traces = {"trained": any(beat.step for beat in beats), "stopping": (folder / STOP).exists()}
        hung = {int(path.name.removeprefix(HUNG)) for path in folder.glob(f"{HUNG}*")}
    if not failures:
        return End(max((int(record.sentence) for record in records.values() if record.kind == STOPPED), default=0))
    if watchdog.verdict:
        return End(1, watchdog.verdict, watchdog.blamed, **traces)
    message, code = _verdict(nproc, failures, records, hung)
    blamed = _blamed(failures, records)
    if blamed in hung or (blamed in records and records[blamed].kind == STALLED):
        message += f"\n{account(beats)}"
    elif mismatched := differences(beats, certain=True):
        message += "\n" + "\n".join(mismatched)
    return End(code, message, blamed, **traces)


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

    The first signal of `ENDING` asks the workers to save and stop; where none listens, and when it `stops_at_once`, it raises
    KeyboardInterrupt.
    `STUCK` seconds after a worker has failed, those that SIGTERM has not ended (stopped by a debugger, hung in a driver) are killed;
    elastic would give them half a minute.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._ending, self._first = folder, False, 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]
        handlers = {**dict.fromkeys(ENDING, self._ask), signal.SIGCHLD: self._wait, signal.SIGALRM: self._kill}
        self._former = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def __exit__(self, *exception: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not any(self._folder.glob("listening-*")) or (self._first and stops_at_once(self._first, number)):
            self._ending = True
            self._wait()
            raise KeyboardInterrupt
        if not self._first:
            self._first = number
            draft = self._folder / "draft-stop"
            draft.write_text(str(ENDING[signal.Signals(number)]))
            draft.replace(self._folder / STOP)
            answer(number)

    def _wait(self, *signal_and_frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, STUCK)

    def _kill(self, *signal_and_frame: object) -> None:
        """What a worker writes at its start, it removes at an orderly end: what is left of a gone one means that it failed."""
        begun = workers(self._folder)
        running = {rank: process for rank, process in begun.items() if leads_session(process)}
        if self._ending or len(running) < len(begun):
            for rank in running:
                (self._folder / f"{HUNG}{rank}").touch()
            kill(running.values())


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
    if code == INTERRUPTED:
        return "was interrupted by SIGINT"
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"was killed by {name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    return f"was killed by signal {-code}"
