"""The processes of a sweep: `teratron train` as a child, here or on another machine, that saves and stops when its starter goes away."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teratron.parallel.launch import own_command
from teratron.tasks.sweep_space import Point
from teratron.train.history import History, number, read_history
from teratron.train.live import NAME

WRAPPER = """
exec 3<&0
"$@" </dev/null 3<&- &
child=$!
{ cat <&3; kill -TERM $child; } >/dev/null 2>&1 &
watch=$!
exec 3<&-
wait $child
code=$?
kill $watch 2>/dev/null
exit $code
"""
"""Runs a command; the end of its own input asks that command to save and stop: so does the death of who held the other end, anywhere."""
TAIL = 8192


@dataclass(frozen=True)
class Slot:
    """A place for one job."""

    machine: str = ""
    """"" = here."""
    threads: int = 0
    """OMP_NUM_THREADS of its processes; 0 = as the machine has it."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of its processes; empty = as the machine has it."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that has a `teratron` command line run here."""
        settings = {"OMP_NUM_THREADS": str(self.threads or ""), "CUDA_VISIBLE_DEVICES": self.devices}
        if self.machine:
            settings["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
        given = [f"{name}={value}" for name, value in settings.items() if value]
        wrapped = ["sh", "-c", WRAPPER, "sh", "env", *given, sys.executable, *own_command(arguments)]
        if not self.machine:
            return wrapped
        return ["ssh", "-o", "BatchMode=yes", self.machine, f"cd {shlex.quote(os.getcwd())} && {shlex.join(wrapped)}"]


@dataclass(frozen=True)
class Outcome:
    """How a trial came through a round."""

    trial: int
    step: int
    """Up to which it was to train."""
    state: str
    """`done`; `diverged`, which is final; or `failed`, which the same command tries again."""
    value: float = math.nan
    """Of the metric; NaN where it is not done."""
    seconds: float = 0.0
    """In training steps, from the beginning of the trial."""
    reason: str = ""


class Job:
    """One trial's process, from its start until `poll` says that it has ended."""

    def __init__(self, trial: int, run: Path, step: int, arguments: Sequence[str], slot: Slot) -> None:
        """run: the trial's run directory, whose stop step is already set. step: which that is."""
        self.trial, self.run, self.step, self.slot = trial, run, step, slot
        self.log = run.with_suffix(".log")
        command = slot.command(arguments)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(['teratron', *arguments])}\n".encode())
            log.flush()
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        code = self.process.poll()
        if code is not None:
            self.stop()
        return code

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()

    def kill(self) -> None:
        """End it at once; what runs on another machine saves."""
        self.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def progress(self) -> dict[str, Any]:
        """Its last step event; empty before the first."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            if line.startswith(b'{"event": "step"') and line.endswith(b"}"):
                return dict(json.loads(line))
        return {}

    def outcome(self, code: int, metric: str) -> Outcome:
        """What came of it."""
        history = read_history(self.run / "metrics.jsonl")
        value, seconds = measure(history, metric, self.step), history.useful
        if code == 0 and math.isfinite(value):
            return Outcome(self.trial, self.step, "done", value, seconds)
        if code == 0:
            reason = f"no {metric} at step {self.step}: expected held-out data (data.split or data.valid), or --metric loss"
            return Outcome(self.trial, self.step, "failed", seconds=seconds, reason=reason)
        state = "diverged" if code == 2 and history.of_kind("bad_numbers") else "failed"
        return Outcome(self.trial, self.step, state, seconds=seconds, reason=self._last_words() or f"exit code {code}")

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines() if line.strip()]
        told = [line.removeprefix("teratron: error: ") for line in lines if line.startswith("teratron: error: ")]
        return (told or lines or [""])[-1]


def measure(history: History, metric: str, step: int) -> float:
    """What a run has reached at a step: `valid_loss`, or `loss`, the mean of the training loss over the last 5 % of the steps."""
    if metric == "valid_loss":
        return next(
            (number(event.get("loss")) for event in reversed(history.of_kind("eval")) if number(event.get("step")) == step), math.nan
        )
    pairs = zip(history.columns["step"], history.columns["loss"], strict=True)
    recent = [loss for at, loss in pairs if step - max(1, step // 20) < at <= step]
    return sum(recent) / len(recent) if recent and history.last("step") >= step else math.nan


def set_stop(run: Path, step: int, steps: int) -> None:
    """Have a run end after a step of its `train.steps`, whose schedule stays that of all its steps."""
    run.mkdir(parents=True, exist_ok=True)
    if step < steps:
        (run / NAME).write_text(f"stop_step = {step}\n", "utf-8")
    else:
        (run / NAME).unlink(missing_ok=True)


def arguments_of(run: Path, base: Path, point: Point, nproc: int, device: str) -> list[str]:
    """The `teratron` command line that trains a trial."""
    keys = [f"--{key}={value}" for key, value in point.items()]
    return ["train", str(base), "--run", str(run), *keys, "--device", device, *(["--nproc", str(nproc)] if nproc > 1 else [])]


def slots_of(machines: Sequence[str], jobs: int, nproc: int, device: str, cores: int) -> list[Slot]:
    """`jobs` places on this machine or on each of others; its cores are shared out, with device cuda also its GPUs, nproc each."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if not machines else []
    devices = own if any(own) else [str(i) for i in range(jobs * nproc)]
    set_by_user = int(text) if (text := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() else 0
    threads = set_by_user or (0 if machines else max(1, cores // (jobs * nproc)))
    return [
        Slot(machine, threads, ",".join(devices[job * nproc : (job + 1) * nproc]) if device == "cuda" else "")
        for job in range(jobs)
        for machine in machines or [""]
    ]
