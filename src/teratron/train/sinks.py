"""Weights & Biases and MLflow: each is written to by a process of its own, which may hang or die and never stops a run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teratron.config import LogConfig, UserError
from teratron.train.scalars import scalars

PATIENCE = 20.0
"""Seconds that a service has at the end of a run to take what it was sent."""


class Sink:
    """Sends a run's curves to a service through a process of its own.

    Never waits and never raises once it is made: lines that a full pipe does not take are dropped and counted, a process that has
    ended is told once. metrics.jsonl has everything all the same.
    """

    def __init__(self, service: str, target: str, run: Path, say: Callable[[str], None]) -> None:
        """service: wandb or mlflow. target: its project or experiment. say: takes the line that tells of a failure."""
        self.service, self._say = service, say
        self._log = run / f"{service}.log"
        self._dropped = 0
        program = [sys.executable, "-P", str(Path(__file__).with_name("sink_process.py")), service, target, str(run.resolve())]
        theirs, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(program, stdin=theirs, stdout=log, stderr=log, start_new_session=True)
        os.close(theirs)
        self._open = True

    def write(self, event: dict[str, Any]) -> None:
        """Pass an event's numbers on."""
        values = scalars(event)
        if not self._open or not values:
            return
        line = json.dumps({"step": event["step"], "values": values}).encode() + b"\n"
        try:
            os.write(self._pipe, line)  # shorter than PIPE_BUF: whole or not at all
        except BlockingIOError:
            self._dropped += 1
        except OSError:
            self._give_up("its process has ended")

    def close(self) -> None:
        """Let the process finish, for a while."""
        if not self._open:
            return
        os.close(self._pipe)
        self._open = False
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._tell(f"it did not take everything within {PATIENCE:g} s")
            return
        if code:
            self._tell(f"its process ended with code {code}")
        elif self._dropped:
            self._tell(f"{self._dropped} events were dropped")

    def _give_up(self, why: str) -> None:
        os.close(self._pipe)
        self._open = False
        self._process.kill()
        self._process.wait()
        self._tell(why)

    def _tell(self, why: str) -> None:
        said = self._log.read_text("utf-8", "replace").strip().splitlines()
        last = f": {said[-1].strip()}" if said else ""
        self._say(f"log.{self.service}: {why}{last}; metrics.jsonl has everything, see also {self._log}")


def open_sinks(config: LogConfig, run: Path, say: Callable[[str], None]) -> list[Sink]:
    """What `log.wandb` and `log.mlflow` ask for."""
    return [Sink(service, target, run, say) for service, target in _wanted(config).items()]


def check_sinks(config: LogConfig) -> None:
    """Raise `UserError` for a package that is not installed."""
    for service, target in _wanted(config).items():
        if importlib.util.find_spec(service) is None:
            raise UserError(f"log.{service} = {target}, but the package is not installed: pip install {service}, or leave the key out")


def _wanted(config: LogConfig) -> dict[str, str]:
    """Project or experiment by service."""
    return {service: target for service, target in (("wandb", config.wandb), ("mlflow", config.mlflow)) if target}
