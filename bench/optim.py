"""`python bench/optim.py`: milliseconds of each optimizer's update and its share of memory bandwidth, beside torch's own; medians."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it: threads that spin for long collapse beside other programs

import torch
from machine import add_line, facts
from rich.console import Console
from rich.table import Table

from teratron.config import ModelConfig, OptimConfig, ParallelConfig, UserError
from teratron.models import Model, build_model, parameter_count
from teratron.optim import OPTIMIZERS, build_optimizer
from teratron.optim.optimizer import Update
from teratron.parallel.device import choose_device
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Mesh
from teratron.parallel.offload import Home
from teratron.parallel.stages import Stages

SHAPES = {
    "30M": ModelConfig(layers=6, hidden=512, heads=8, vocab_size=20000, seq_length=512),
    "120M": ModelConfig(layers=12, hidden=768, heads=12, vocab_size=50257),
}
PATIENCE = 60.0
"""Seconds for one contender; torch's Muon works in bfloat16, which a CPU without instructions for it emulates."""
Run = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    build: Callable[[], Run]
    """Makes a model with gradients; what it returns is one update."""
    states: int
    """Numbers of state a weight, which are read and written."""


@dataclass(frozen=True)
class Found:
    milliseconds: float
    share: float
    """Of the bandwidth of a copy, were each number moved once: weights and states read and written, gradients read."""
    ratio: float
    """Time over that of torch's fused AdamW in the same round."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES), help="parameters (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="medians are over them (default: 7)")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    try:
        device = choose_device(args.device)
        for size in args.sizes:
            found = measure(SHAPES[size], args.rounds, device)
            Console().print(table(f"{size} parameters in float32 on {device.type}, {torch.get_num_threads()} threads", found))
            if args.json:
                results = {name: asdict(result) for name, result in found.items()}
                add_line(args.json, {**facts(device.type), "size": size, "rounds": args.rounds, "found": results})
    except UserError as error:
        print(f"bench/optim.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(shape: ModelConfig, rounds: int, device: torch.device) -> dict[str, Found]:
    """Every contender's update in turn with torch's fused AdamW and with a copy, so that drift of the machine cancels."""
    fused, copy = torch_adamw(shape, device, fused=True)(), copying(parameter_count(build_model(shape, device="meta")), device)
    found = {}
    for name, contender in contenders(shape, device).items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        runs = (contender.build(), fused, copy)
        laps = timed(runs, rounds, device)
        own, ratio = median(lap[0] for lap in laps), median(lap[0] / lap[1] for lap in laps)
        passes = (3 + 2 * contender.states) / 2  # a copy is two
        found[name] = Found(1e3 * own, passes * median(lap[2] / lap[0] for lap in laps), ratio)
    return found


def timed(runs: Sequence[Run], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each run in each round, after one to warm up; fewer, or only that one, where they would take longer than `PATIENCE`."""
    laps: list[list[float]] = []
    while len(laps) <= rounds and sum(map(sum, laps)) < PATIENCE:
        laps.append([seconds(run, device) for run in runs])
    return laps[1:] or laps


def contenders(shape: ModelConfig, device: torch.device) -> dict[str, Contender]:
    """torch's own, then ours."""
    theirs = {
        "torch AdamW, fused": Contender(torch_adamw(shape, device, fused=True), 2),
        "torch AdamW, foreach": Contender(torch_adamw(shape, device, foreach=True), 2),
        "torch Muon, fused AdamW": Contender(lambda: torch_muon(shape, device), 1),
    }
    return theirs | {name: Contender(ours(shape, device, name), len(kind.states)) for name, kind in OPTIMIZERS.items()}


def ours(shape: ModelConfig, device: torch.device, name: Any) -> Callable[[], Run]:
    """The update alone, as theirs: without the norm for clipping and without clearing the gradients."""

    def build() -> Run:
        flat = FlatModel(Stages({0: filled(shape, device)}), Mesh(), ParallelConfig(), Home(device))
        optimizer = build_optimizer(flat, OptimConfig(name=name, schedule="constant"))
        how = Update(1, 1e-4, torch.ones((), dtype=torch.float64, device=device), torch.zeros((), device=device))
        for bucket in flat.trained:
            bucket.gradient.normal_(std=1e-3)
        return lambda: optimizer.advance(how)

    return build


def torch_adamw(shape: ModelConfig, device: torch.device, **options: Any) -> Callable[[], Run]:
    def build() -> Run:
        return torch.optim.AdamW(filled(shape, device, gradients=True).parameters(), **options).step

    return build


def torch_muon(shape: ModelConfig, device: torch.device) -> Run:
    """Muon for the matrices of blocks, of which a fused one is one; AdamW for the rest."""
    named = dict(filled(shape, device, gradients=True).named_parameters())
    matrices = {name: p for name, p in named.items() if name.startswith("blocks.") and p.dim() == 2}
    rest = [p for name, p in named.items() if name not in matrices]
    optimizers = torch.optim.Muon(matrices.values()), torch.optim.AdamW(rest, fused=True)
    return lambda: [optimizer.step() for optimizer in optimizers]


def filled(shape: ModelConfig, device: torch.device, gradients: bool = False) -> Model:
    """A model with some weights, and gradients."""
    model = build_model(shape, device=device)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3 if gradients else None
    return model


def copying(count: int, device: torch.device) -> Run:
    """A copy of as many float32 numbers as there are weights."""
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(title: str, found: dict[str, Found]) -> Table:
    grid = Table(title=title)
    grid.add_column("contender")
    for heading in ("ms", "share of a copy's bandwidth", "time over torch's fused AdamW"):
        grid.add_column(heading, justify="right")
    for name, result in found.items():
        grid.add_row(name, f"{result.milliseconds:,.1f}", f"{result.share:.0%}", f"{result.ratio:.2f} x")
    return grid


if __name__ == "__main__":
    sys.exit(main())
