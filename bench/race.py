"""Rounds of training in turn, each contender in a process of its own, so that memory is its own and drift of the machine hits all."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch
from job import Job
from peers import BENCH, OURS, PEERS, Peer
from workloads import OPTIM, Workload, initial_parts, write_inputs

from teratron.config import UserError
from teratron.models import build_model, flops_per_token
from teratron.parallel.device import DTYPES
from teratron.train.device import measure_peak

TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (0.02, 0.02)}
"""Largest relative difference of those losses from this project's."""


@dataclass(frozen=True)
class Settings:
    """How a race is run."""

    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    rounds: int = 5
    steps: int = 0
    """Timed steps of a round; 0 = the workload's own number."""
    switches: bool = False
    """Whether the peers get this project's settings of the process too."""


@dataclass
class Lane:
    """What one contender has shown."""

    name: str
    parameters: int
    losses: list[float]
    """Loss of each of the `CHECKS` steps."""
    imports: int
    """Bytes of the process before its model was built; 0 on CUDA."""
    seconds: list[float] = field(default_factory=list)
    """Of one step, each round's mean."""
    memory: int = 0
    """Peak bytes: of the whole process on CPU, of the allocator on CUDA."""


@dataclass(frozen=True)
class Race:
    """The lanes of all contenders, this project's first, and what their speed is measured against."""

    lanes: list[Lane]
    flops_per_token: float
    peak_flops: float
    """Best product of matrices in any round, in floating-point operations a second."""


def race(workload: Workload, peers: Sequence[str], settings: Settings) -> Race:
    """Check that all compute the same thing, then time rounds of steps, the contenders taking turns.

    Raises `UserError` when a peer computes something else, or dies.
    """
    torch.set_num_threads(settings.threads)
    kind, dtype, peak = torch.device(settings.device), DTYPES[settings.precision], 0.0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_inputs(Path(folder), workload, initial_parts(workload.model))
        racers = []
        for name, peer in [("teratron", OURS), *((name, PEERS[name]) for name in peers)]:
            racers.append(Racer(name, peer, job(workload, peer, folder, settings)))
            stack.callback(racers[-1].stop)
        lanes = [racer.meet() for racer in racers]
        check_same([lane for lane in lanes if lane.name == "teratron" or PEERS[lane.name].compared(workload)], settings.precision)
        for _ in range(settings.rounds):
            peak = max(peak, measure_peak(kind, dtype))
            for racer in racers:
                racer.lane.seconds.append(racer.ask(settings.steps or workload.steps))
        for racer in racers:
            racer.lane.memory = racer.ask(0)
    flops = flops_per_token(build_model(workload.model, device="meta"), workload.shape.seq_length)
    return Race(lanes, flops, peak)


def job(workload: Workload, peer: Peer, folder: str, settings: Settings) -> Job:
    """What the contender is told."""
    return Job(
        folder, peer.contender, peer.variant, workload.shape, workload.batch, settings.precision, settings.device, settings.threads,
        settings.switches, OPTIM.lr, (OPTIM.beta1, OPTIM.beta2), OPTIM.eps, OPTIM.weight_decay, OPTIM.clip,
    )  # fmt: skip


def check_same(lanes: Sequence[Lane], precision: str) -> None:
    """Raises `UserError` unless all lanes have the first one's number of parameters and its losses."""
    right = lanes[0]
    for lane in lanes[1:]:
        if lane.parameters != right.parameters:
            raise UserError(f"{lane.name} has {lane.parameters:,} parameters, {right.name} {right.parameters:,}: not the same model")
        for step, (loss, expected, tolerance) in enumerate(zip(lane.losses, right.losses, TOLERANCE[precision], strict=True), 1):
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise UserError(f"{lane.name} has loss {loss:.7f} at step {step}, {right.name} {expected:.7f}: not the same computation")


class Racer:
    """A contender in its own fresh process, of its own Python."""

    lane: Lane

    def __init__(self, name: str, peer: Peer, job: Job) -> None:
        path = Path(job.folder) / f"{name}.json"
        path.write_text(job.text(), "utf-8")
        self.name = name
        self._log = path.with_suffix(".log").open("w+", encoding="utf-8", errors="replace")
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": str(BENCH)}
        self._process = subprocess.Popen(
            [peer.python, BENCH / "lane.py", path], stdin=PIPE, stdout=PIPE, stderr=self._log, text=True, env=environment, cwd=job.folder
        )

    def meet(self) -> Lane:
        """Wait until it has made its first steps; what they were."""
        self.lane = Lane(self.name, **self._receive())
        return self.lane

    def ask(self, steps: int) -> Any:
        """Seconds a step over `steps` steps; with 0 its peak memory in bytes."""
        print(steps, file=self._process.stdin, flush=True)
        return self._receive()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        last = "".join(self._log.readlines()[-12:])
        raise UserError(f"{self.name} ended with exit code {code} (-9 = out of memory); it said last:\n{last}")
