"""The worker's side of a run in several processes: who it is, joining the other ranks, and telling the launcher how it ended."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from teratron.config import UserError
from teratron.parallel.doing import TIMEOUT, Doing, Stall

if TYPE_CHECKING:
    import torch

LAUNCHER = "TERATRON_LAUNCHER"
"""Environment variable of the workers that `launch` starts: PID:FOLDER, the launcher's process and its private folder."""
INTERRUPTED, PREEMPTED = 130, 75
"""Exit codes of a run that was asked to stop, and saved: by the user; by whoever wants the machine for a while (EX_TEMPFAIL)."""
ENDING = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED, signal.SIGUSR2: PREEMPTED}
"""The signals that ask to save and stop, and the exit code that then says why."""
LOCALHOST = "127.0.0.1"

USER, DEFECT, STALLED, LOST, STOPPED = "user error", "defect", "waited in vain", "lost connection", "stopped"
"""Kinds of records. Who waited in vain or lost a connection suffers from another rank, so it is blamed last."""
PATIENCE = {USER: 2.0, DEFECT: 0.5, STALLED: 0.5, LOST: 5.0}
"""Seconds that a failed worker stays, so that the launcher sees the dead first and all ranks can say the same."""
LOST_CONNECTION = re.compile(r"gloo/|NCCL|[Cc]onnection (was likely )?(closed|reset|refused|aborted)|Broken pipe")


STOP = "stop"
"""File of the launcher's folder that asks to save and stop; holds the exit code."""
RESTARTS = "restarts"
"""File of the launcher's folder with what has made it start this run again, as long as the run has taken no note of it."""
STACK, ASK_STACK = "stack-", signal.SIGUSR1
"""File of the launcher's folder, with the rank behind, to which a worker adds its Python stacks, and the signal that asks for them."""


@dataclass(frozen=True)
class Worker:
    """Which of the run's processes this is: its rank among all `world`, and among the `local_world` of this machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


@dataclass(frozen=True)
class Record:
    """How a worker ended, as it tells the launcher: `time` in seconds since the epoch, `sentence` a line, `trace` a traceback."""

    rank: int
    kind: str
    time: float
    sentence: str = ""
    trace: str = ""


def this_worker() -> Worker | None:
    """Which worker this process is, as `launch`, torchrun or srun says in its environment; None for a process on its own.

    Under srun with several tasks it also sets MASTER_ADDR and MASTER_PORT where they are unset. Raises `UserError` for variables that
    are no numbers, and for some of torchrun's without the others: alone, each of several processes would train a model of its own.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if not missing:
        world = _number("WORLD_SIZE")
        _check_environment(_number("RANK"), world)
        local_world = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world
        return Worker(_number("RANK"), world, _number("LOCAL_RANK"), local_world)
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise UserError(
            f"environment variable RANK={os.environ['RANK']} is set, but {' and '.join(missing)} not: start with torchrun, which sets all "
            "of them, or unset RANK"
        )
    return _slurm_task()


def _check_environment(rank: int, world: int) -> None:
    if rank >= world:
        raise UserError(f"environment variables RANK={rank} and WORLD_SIZE={world}: expected RANK below WORLD_SIZE, as torchrun sets them")


def _slurm_task() -> Worker | None:
    # A batch script itself has SLURM_PROCID and SLURM_NTASKS too; only what srun starts is a step.
    if not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"} <= os.environ.keys():
        return None
    world = _number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS")
    if world == 1:
        return None
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    first = re.sub(r"\[([^],-]+)[^]]*]", r"\1", nodes).partition(",")[0] if nodes else os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    os.environ.setdefault("MASTER_ADDR", first or LOCALHOST)
    # Below the ports that systems hand out; two steps of a job on the same node get different ones.
    job = _number("SLURM_JOB_ID") if "SLURM_JOB_ID" in os.environ else 0
    os.environ.setdefault("MASTER_PORT", str(15000 + (job + _number("SLURM_STEP_ID")) % 15000))
    return Worker(_number("SLURM_PROCID"), world, _number("SLURM_LOCALID"), _tasks_on_node(world))


def _tasks_on_node(world: int) -> int:
    """How many tasks of the step run on this node, from a list such as `4(x2),3`, which means 4, 4, 3."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or str(world)
    tasks = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    node = _number("SLURM_NODEID") if "SLURM_NODEID" in os.environ else 0
    return tasks[node] if node < len(tasks) else world


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise UserError(f"environment variable {name}={value!r}: expected a whole number, as torchrun or srun sets it; or unset it")
    return int(value)


def connect(worker: Worker, device: torch.device, timeout: timedelta = TIMEOUT) -> None:
    """Join the other ranks: gloo for CPU tensors and, on a CUDA device, NCCL for CUDA tensors.

    timeout: how long a collective over all ranks waits. Raises `UserError` when it is not said where they meet, or they do not.
    """
    import torch
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"environment variable {missing[0]} is not set, expected where the {worker.world} processes meet: start them with torchrun or "
            "srun, or with --nproc on one machine"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=_meeting(worker, timeout), rank=worker.rank, world_size=worker.world, timeout=timeout)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {worker.rank} of {worker.world} could not join the others at MASTER_ADDR:MASTER_PORT = {where}: {reason}; "
            "check that all were started, and that this address reaches the first one"
        ) from error


def _meeting(worker: Worker, timeout: timedelta) -> Any:
    """Where the ranks find each other. A torchrun that starts ranks again keeps its store, in which the dead have left their addresses."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch declares it in C++
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", worker.rank, worker.world, timeout=timeout))
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def disconnect() -> None:
    """Leave the other ranks at an orderly end; while an exception goes up this does nothing, since it could wait for a dead rank."""
    import torch.distributed as dist

    if sys.exc_info()[0] is None and dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether `launch` has started this process. A process that a worker starts inherits its environment, but leads no session."""
    return LAUNCHER in os.environ and os.getsid(0) == os.getpid()


def telling() -> Doing:
    """Where this process says what it is doing: a worker of `launch` to the launcher."""
    return Doing(_folder() / f"doing-{os.environ['RANK']}" if launched() else None)


def take_restarts() -> list[dict[str, Any]]:
    """What has made the launcher start this run again: `time` in seconds since the epoch, `rank`, `cause`; each is handed out once."""
    path = _folder() / RESTARTS if launched() else None
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text("utf-8"))
    path.unlink()
    return found


def supervised(body: Callable[[], int]) -> int:
    """Run the whole of a process, and return its exit code; outside of a worker this only calls `body`.

    A worker ends without Python's own exit: that waits for threads that may wait for other ranks, and aborts when a thread of a process
    group lets go of a tensor meanwhile. A worker of `launch` also dies with the launcher, however that dies; an exception is told to
    the launcher; and codes 130 and 75 become 0, since elastic would end the ranks that are still saving.
    """
    if not launched():
        return _tell_oneself(body)
    _die_with_launcher()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # meant for the launcher, but SLURM sends it and SIGUSR1 to every process
    faulthandler.register(ASK_STACK, open(_folder() / f"{STACK}{os.environ['RANK']}", "ab"), all_threads=True)  # noqa: SIM115
    process = _folder() / f"process-{os.environ['RANK']}-{os.getpid()}"
    process.touch()
    try:
        code = body()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        leave(INTERRUPTED)  # a signal to this worker alone, which asks for nothing
    except Exception as error:
        _report(error)
    if code in ENDING.values():
        _write(STOPPED, str(code))
    elif code:
        leave(code)
    process.unlink()
    leave(0)


def _tell_oneself(body: Callable[[], int]) -> int:
    """`body` in a process that `launch` has not started; a worker of torchrun or srun does not return."""
    try:
        worker = this_worker()
    except UserError:
        return body()  # which says so, if it matters to it
    if worker is None:
        return body()
    try:
        code = body()
    except Exception as error:
        code = 1
        if _kind(error) == STALLED:
            print(f"teratron: error: rank {worker.rank} waited in vain: {error}", file=sys.stderr)
        elif _kind(error) == LOST:
            print(f"teratron: error: rank {worker.rank} lost the connection to another rank; its own error stands with it", file=sys.stderr)
        else:
            traceback.print_exception(error)
    leave(code)


def listen(on: bool) -> None:
    """Tell the launcher whether this worker now looks at `stop_requested`: it asks only then, and else ends all at once."""
    mark = _folder() / f"listening-{os.environ['RANK']}"
    mark.touch() if on else mark.unlink(missing_ok=True)


def stop_requested() -> int:
    """0, or the exit code with which the launcher has asked to save and stop; ranks may learn of it at different steps."""
    stop = _folder() / STOP if launched() else None
    return int(stop.read_text()) if stop is not None and stop.exists() else 0


def answer(number: int) -> None:
    """Say on stderr what the first signal of `ENDING` leads to; not by a stream, in the middle of a write to which it may have come."""
    again = " (again = stop at once)" if number in (signal.SIGINT, signal.SIGTERM) else ""
    with contextlib.suppress(OSError):  # such as a reader that the same Ctrl-C has ended
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving{again}\n".encode())


def stops_at_once(first: int, number: int) -> bool:
    """Whether a further signal of `ENDING` ends a run that is saving already: schedulers announce themselves with several."""
    return number == signal.SIGINT or number == first == signal.SIGTERM


def _folder() -> Path:
    return Path(os.environ[LAUNCHER].partition(":")[2])


def _die_with_launcher() -> None:
    """Let the kernel kill this process when its parent dies (Linux only; elsewhere a killed launcher leaves its workers)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[LAUNCHER].partition(":")[0]):
        os._exit(1)  # it had died before


def _report(error: BaseException) -> NoReturn:
    """Tell the launcher, stay a while, and leave."""
    kind = _kind(error)
    if kind == USER:
        sentence, trace = " ".join(str(error).splitlines()), ""
    else:
        sentence = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
        trace = "".join(traceback.format_exception(error))
    try:
        _write(kind, sentence, trace)
    except OSError:
        print(f"teratron: error: rank {os.environ['RANK']}: {sentence}\n{trace}", file=sys.stderr)
    end = time.monotonic() + PATIENCE[kind]
    while len(list(_folder().glob("rank-*.json"))) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < end:
        time.sleep(0.05)
    leave(2 if kind == USER else 1)


def leave(code: int) -> NoReturn:
    """End the process at once; after an orderly end, what was to be done at exit is done."""
    if code == 0:
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _kind(error: BaseException) -> str:
    """What sort of failure this is. The first exception of a chain counts: cleaning up after it may well lose connections."""
    first = error
    while not isinstance(first, Stall) and (before := first.__cause__ or first.__context__):
        first = before
    if isinstance(first, Stall):
        return STALLED
    if isinstance(first, RuntimeError):
        from torch.distributed import DistError

        if isinstance(first, DistError) or LOST_CONNECTION.search(str(first)):
            return LOST
    return USER if isinstance(error, UserError) else DEFECT


def _write(kind: str, sentence: str = "", trace: str = "") -> None:
    """Leave this worker's record in the launcher's folder, whole or not at all."""
    record = Record(int(os.environ["RANK"]), kind, time.time(), sentence, trace)
    draft = _folder() / f"draft-{record.rank}"
    draft.write_text(json.dumps(asdict(record)), "utf-8")
    draft.replace(_folder() / f"rank-{record.rank}.json")
