"""How fast each kind of a step's work could be: its operations, bytes and messages at the speeds that are measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from teratron.config import Config
from teratron.parallel.mesh import Mesh
from teratron.plan.dryrun import DryRun, dry_run
from teratron.plan.meter import ATTENTION, ELEMENTWISE, OPTIMIZER, PRODUCTS
from teratron.train.breakdown import COMMUNICATION, HOST, IDLE
from teratron.train.engine import Engine
from teratron.train.trial import Speed, Trial, best_seconds

MOVED, SENT = 2**27, 2**24
"""Bytes of the buffers that are copied and summed to measure: far more than caches hold; as much as a large bucket."""


@dataclass(frozen=True)
class Speeds:
    """Of this machine, a second."""

    flops: float
    """Floating-point operations of a large matrix product."""
    memory: float
    """Bytes that a copy reads and writes."""
    link: float
    """Bytes that leave a rank in a sum over all ranks; 0 = there is one rank."""


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes."""

    config: Config
    speed: Speed
    """Of steps that nobody traces."""
    ranks: Sequence[Mapping[str, float]]
    """Each rank's milliseconds of a traced step, by kind of work."""
    rank: int
    """That has the most work of its own: the others wait for it."""
    least: Mapping[str, float]
    """Milliseconds that its kinds of work would take at the speeds of the machine."""
    speeds: Speeds
    cuda: bool

    @property
    def kinds(self) -> Mapping[str, float]:
        return self.ranks[self.rank]

    @property
    def traced(self) -> float:
        """Seconds of a traced step."""
        return sum(self.kinds.values()) / 1e3


def profile(trial: Trial, steps: int, folder: Path | None) -> Profile:
    """Time so many steps, trace half as many, and measure the machine. folder: to keep the traces in; a collective."""
    speed = trial.speed(steps)
    ranks = trial.breakdown(max(1, steps // 2), folder)
    speeds = measure_speeds(speed.peak_flops, trial.mesh, trial.device)
    rank = busiest(ranks)
    least = bounds(counted(trial.config, trial.mesh, rank), speeds)
    return Profile(trial.config, speed, ranks, rank, least, speeds, trial.device.type == "cuda")


def busiest(ranks: Sequence[Mapping[str, float]]) -> int:
    """The rank that waits least for others, beside its work."""
    return max(range(len(ranks)), key=lambda rank: sum(ranks[rank].values()) - ranks[rank][COMMUNICATION] - ranks[rank][IDLE])


def measure_speeds(flops: float, mesh: Mesh, device: torch.device) -> Speeds:
    """flops: as `measure_peak` found. A collective."""
    source = torch.ones(MOVED // 4, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: (target.copy_(source), None)[1], device)
    if mesh.world == 1:
        return Speeds(flops, 2 * MOVED / seconds, 0.0)
    message = source[: SENT // 4]
    summing = best_seconds(lambda: mesh.all.sum(message).wait(), device)
    return Speeds(flops, 2 * MOVED / seconds, 2 * SENT * (mesh.world - 1) / mesh.world / summing)


def counted(config: Config, mesh: Mesh, rank: int) -> DryRun:
    """What a rank does in a step, operation by operation: nothing fused, nothing compiled."""
    return dry_run(config.override({"train.compile": False, "parallel.offload": "none"}), mesh.world, rank, Engine)


def bounds(found: DryRun, speeds: Speeds) -> dict[str, float]:
    """Least milliseconds of a kind of work, of those that have a bound."""
    least = {kind: 1e3 * max(work.flops / speeds.flops, work.moved / speeds.memory) for kind, work in found.work.items()}
    sent = sum(sent for _, _, sent in found.messages.values())
    return least | ({COMMUNICATION: 1e3 * sent / speeds.link} if sent and speeds.link else {})


def advice(config: Config, kinds: Mapping[str, float], least: Mapping[str, float], cuda: bool) -> list[tuple[str, str]]:
    """What to try next for the kinds that take most, the dearest first: (kind, a line)."""
    step = sum(kinds.values())
    worth = sorted((kind for kind in kinds if kinds[kind] > 0.05 * step), key=lambda kind: -kinds[kind])
    return [(kind, _try(kind, config, least.get(kind, 0.0) / kinds[kind], cuda)) for kind in worth]


def _try(kind: str, config: Config, reached: float, cuda: bool) -> str:
    """reached: the bound's share of the time."""
    train, parallel = config.train, config.parallel
    if kind == PRODUCTS:
        if reached < 0.6:
            larger = f"a larger train.micro_batch (now {train.micro_batch or 'the whole batch'})" if train.micro_batch else "a wider model"
            cut = f", less parallel.tensor (now {parallel.tensor})" if parallel.tensor > 1 else ""
            return f"small products fall short of the peak: {larger}{cut}"
        if train.precision == "fp32":
            return "near the bound: --train.precision bf16, where the processor has such instructions"
        return "near the bound" + (": --train.precision fp8 on Hopper and later" if cuda and train.precision == "bf16" else "")
    if kind == ATTENTION:
        return "shorter model.seq_length, or model.window where the task allows" if config.model.seq_length > 1024 else _short(reached)
    if kind == ELEMENTWISE:
        return "fuse it: --train.compile" if not train.compile else "compiled already: less recomputation, or a wider model"
    if kind == OPTIMIZER:
        shared = " or parallel.shard = optimizer" if parallel.shard == "none" else ""
        return f"a larger train.global_batch spreads it over more tokens{shared}"
    if kind == COMMUNICATION:
        return "larger global batches, less parallel.tensor, or other processes on these cores" if not cuda else "larger global batches"
    if kind == IDLE:
        return "more micro-batches a step, or parallel.schedule = zb-h1"
    if kind == HOST:
        return "many small operations: a larger train.micro_batch" + ("" if train.compile else ", or --train.compile")
    return "prepare the data ahead: teratron data prepare"


def _short(reached: float) -> str:
    return "near the bound" if reached > 0.5 else "short sequences leave its products small: a larger train.micro_batch"
