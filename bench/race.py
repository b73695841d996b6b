"""Rounds of training in turn, each contender in a process of its own, so that memory is its own and drift of the machine hits all."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peers import build, check_peer
from workloads import Workload, initial_parts, random_rows, write_tokens

from teratron.config import UserError
from teratron.models import build_model, flops_per_token
from teratron.parallel.device import DTYPES
from teratron.train.device import measure_peak, synchronize

CHECKS = 2
"""Steps on given batches before the rounds: losses of the same weights, then of the same weights after one update. They also warm up."""
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (0.02, 0.02)}
"""Largest relative difference of those losses from this project's."""


@dataclass
class Lane:
    """What one contender has shown."""

    name: str
    parameters: int
    losses: list[float]
    """Loss of each of the `CHECKS` steps."""
    imports: int
    """Bytes of the process before its model was built, the random weights included; 0 on CUDA."""
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


def race(workload: Workload, peers: Sequence[str], *, precision: str, device: str, threads: int, steps: int, rounds: int) -> Race:
    """Check that all compute the same thing, then time `rounds` rounds of `steps` steps each, the contenders taking turns.

    Raises `UserError` when a peer cannot run the workload, computes something else, or dies.
    """
    for name in peers:
        check_peer(name, workload)
    torch.set_num_threads(threads)
    peak = 0.0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "tokens"
        write_tokens(data, workload)
        racers = [Racer(name, workload, data, precision, device, threads) for name in ("teratron", *peers)]
        try:
            lanes = [racer.lane for racer in racers]
            check_same(lanes, precision)
            for _ in range(rounds):
                peak = max(peak, measure_peak(torch.device(device), DTYPES[precision]))
                for racer in racers:
                    racer.lane.seconds.append(racer.ask(steps))
            for racer in racers:
                racer.lane.memory = racer.ask(0)
        finally:
            for racer in racers:
                racer.stop()
    flops = flops_per_token(build_model(workload.model, device="meta"), workload.model.seq_length)
    return Race(lanes, flops, peak)


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
    """A contender in its own fresh process; made after it has passed its first steps."""

    def __init__(self, name: str, workload: Workload, data: Path, precision: str, device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, workload, data, precision, device, threads), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.lane: Lane = self._receive()
        except BaseException:
            self.stop()
            raise

    def ask(self, steps: int) -> Any:
        """Seconds a step over `steps` steps; with 0 its peak memory in bytes."""
        self._pipe.send(steps)
        return self._receive()

    def stop(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise UserError(f"{self.name} ended with exit code {code} (-9 = out of memory); its own message is above") from None


def serve(pipe: Connection, name: str, workload: Workload, data: Path, precision: str, device_name: str, threads: int) -> None:
    """The other side of a `Racer`: build, take the first steps, then answer until the pipe closes."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if name.startswith("transformers"):
        import transformers.models.auto.modeling_auto  # noqa: F401  (before the memory of imports is read)
    parts = initial_parts(workload.model)
    imports = process_memory("VmRSS") if device.type == "cpu" else 0
    contender = build(name, workload, data, parts, precision, device)
    del parts
    losses = [contender.learn(random_rows(workload, seed)) for seed in range(CHECKS)]
    pipe.send(Lane(name, contender.parameters(), losses, imports))
    while (steps := _next(pipe)) is not None:
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(steps):
            contender.step()
        synchronize(device)
        if steps:
            pipe.send((time.perf_counter() - begun) / steps)
        else:
            pipe.send(process_memory("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated())


def _next(pipe: Connection) -> int | None:
    try:
        return pipe.recv()
    except EOFError:
        return None


def process_memory(field: str) -> int:
    """Bytes that this process holds (`VmRSS`) or held at most (`VmHWM`); without /proc both are the latter."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # not getrusage: its peak starts at that of the process which started this one
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
