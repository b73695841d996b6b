"""`python bench/train.py`: tokens/s, MFU and peak memory of a training step, beside plain PyTorch and `transformers`, same run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import add_line, facts
from peers import PEERS, find, install
from picture import draw
from race import Lane, Race, Settings, race
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS, Workload

from teratron.config import UserError
from teratron.parallel.device import choose_device


def main() -> int:
    args = _parse()
    workload = WORKLOADS[args.workload]
    try:
        if args.install:
            install(args.install)
            return 0
        if args.picture:
            draw(args.json, args.picture)
            return 0
        device = choose_device(args.device).type
        settings = Settings(args.precision, device, args.threads, args.rounds, args.steps, args.switches)
        result = race(workload, find(args.peers, workload), settings)
        context = facts(device)
        Console().print(table(workload, settings, context["device"], result))
        if args.json:
            add_line(args.json, {**context, "precision": args.precision, "switches": args.switches, **record(workload, result)})
    except UserError as error:
        print(f"bench/train.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = "; ".join(f"{name} = {workload.about}" for name, workload in WORKLOADS.items())
    parser.add_argument("--workload", choices=list(WORKLOADS), default="A", help=f"{shapes} (default: A)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast in the peers (default: fp32)")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(PEERS)} (default: all that are installed and can run it)")
    parser.add_argument("--install", metavar="PEER", help="make this peer's environment, and end")
    parser.add_argument(
        "--switches", action="store_true", help="give the peers this project's settings of the process, which their users do not have"
    )
    parser.add_argument("--steps", type=int, default=0, help="timed steps of a round (default: about a second's worth)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are over them (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the races that are in --json's file, and end")
    args = parser.parse_args()
    if args.picture and not args.json:
        parser.error(f"--picture {args.picture}: expected --json FILE too, the file that races were written to")
    for name, least in (("steps", 0), ("rounds", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected at least {least}")
    return args


def table(workload: Workload, settings: Settings, device: str, result: Race) -> Table:
    """Contenders by row; the last column says how many times as fast as each this project is."""
    shape = workload.shape
    sizes = f"{shape.layers} layers, {shape.hidden} wide, {workload.batch} x {shape.seq_length} tokens, vocabulary {shape.vocab_size:,}"
    title = f"{workload.name}: {workload.about}\n{sizes}, {result.lanes[0].parameters:,} parameters"
    switches = ", same switches for all" * settings.switches
    peak = f"matrix products up to {result.peak_flops / 1e9:,.0f} GFLOP/s"
    caption = f"{settings.precision} on {device}{switches}; {peak}; {len(result.lanes[0].seconds)} rounds"
    grid = Table(title=title, caption=caption)
    grid.add_column("contender")
    for heading in ("tokens/s", "ms/step", "MFU", "peak MiB", "less imports", "ours is"):
        grid.add_column(heading, justify="right")
    for lane in result.lanes:
        grid.add_row(*_cells(lane, workload, result))
    if result.lanes[1:]:
        best = best_peer(result)
        grid.add_section()
        grid.add_row("ours / best peer", *[""] * 5, f"{speed_ratio(result.lanes[0], best):.2f} x", style="bold")
    return grid


def _cells(lane: Lane, workload: Workload, result: Race) -> list[str]:
    seconds, ours = median(lane.seconds), result.lanes[0]
    return [
        lane.name,
        f"{workload.tokens / seconds:,.0f}",
        f"{seconds * 1e3:,.1f}",
        f"{utilisation(lane, workload, result):.1%}",
        f"{lane.memory / 2**20:,.0f}",
        f"{(lane.memory - lane.imports) / 2**20:,.0f}",
        "" if lane is ours else f"{speed_ratio(ours, lane):.2f} x",
    ]


def utilisation(lane: Lane, workload: Workload, result: Race) -> float:
    """Model floating-point operations a second as a share of the measured peak (MFU)."""
    return workload.tokens / median(lane.seconds) * result.flops_per_token / result.peak_flops


def speed_ratio(ours: Lane, peer: Lane) -> float:
    """How many times as fast as a peer: the median over rounds of the ratio within the round, which drift of the machine leaves alone."""
    return median(theirs / own for own, theirs in zip(ours.seconds, peer.seconds, strict=True))


def best_peer(result: Race) -> Lane:
    """The fastest of the others."""
    return min(result.lanes[1:], key=lambda lane: median(lane.seconds))


def record(workload: Workload, result: Race) -> dict[str, Any]:
    """The result as plain numbers: seconds, bytes, tokens/s."""
    ours = result.lanes[0]
    contenders = {
        lane.name: {
            "tokens_per_second": workload.tokens / median(lane.seconds),
            "mfu": utilisation(lane, workload, result),
            "seconds": lane.seconds,
            "memory": lane.memory,
            "imports": lane.imports,
            "losses": lane.losses,
            "ours_is": speed_ratio(ours, lane),
        }
        for lane in result.lanes
    }
    facts = {"workload": workload.name, "parameters": ours.parameters, "tokens_per_step": workload.tokens}
    return {**facts, "peak_flops": result.peak_flops, "flops_per_token": result.flops_per_token, "contenders": contenders}


if __name__ == "__main__":
    sys.exit(main())
