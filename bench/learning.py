"""`python bench/learning.py --text FILE`: what a model has learnt after equal tokens and after equal time, by optimizer and batch.

Every row is `teratron train shakespeare-char` at several learning rates, of which the best counts. Time is that of a step measured in
turn with AdamW's, so that the load of the machine during the runs does not matter. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import add_line, facts
from optim import seconds
from rich.console import Console
from rich.table import Table

from teratron.config import Config, UserError
from teratron.objectives import Batch
from teratron.parallel.mesh import Mesh
from teratron.train.engine import Engine

BATCH = 8
"""Sequences of 64 characters in a step of the rows whose batch is not larger."""
EVALUATIONS = 20
"""Over a run, on the same held-out batches each."""


@dataclass(frozen=True)
class Row:
    """An optimizer and what goes with it."""

    keys: dict[str, Any]
    rates: tuple[float, ...]
    times: int = 1
    """How many times as large the batch is; there are so many times fewer steps."""


ROWS = {
    "adamw": Row({"optim.name": "adamw"}, (2e-3, 4e-3, 8e-3)),
    "lion": Row({"optim.name": "lion", "optim.weight_decay": 1.0}, (2e-4, 4e-4, 8e-4)),
    "muon": Row({"optim.name": "muon", "optim.adam_lr": 4e-3}, (2e-3, 5e-3, 1e-2)),
    "lamb": Row({"optim.name": "lamb"}, (3e-3, 1e-2, 3e-2)),
    "adamw-x16": Row({"optim.name": "adamw"}, (2e-3, 4e-3, 8e-3), 16),
    "lamb-x16": Row({"optim.name": "lamb"}, (1e-2, 3e-2, 6e-2), 16),
}
Curve = list[tuple[int, float]]
"""Steps and held-out losses."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="what is learnt, such as Shakespeare's plays")
    parser.add_argument("--runs", type=Path, default=Path("learning-runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1024, help="steps of rows whose batch is not larger (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="(default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    args = parser.parse_args()
    if args.steps < max(row.times for row in ROWS.values()):
        parser.error(f"--steps {args.steps}: expected at least {max(row.times for row in ROWS.values())}")
    try:
        best = {name: learn(args.text, args.runs, args.steps, name) for name in dict.fromkeys(["adamw", *args.rows])}
        laps = race({name: ROWS[name] for name in best})
        Console().print(table(best, laps, args.steps))
        if args.json:
            add_line(args.json, {**facts("cpu"), "steps": args.steps, "curves": best, "seconds": laps})
    except UserError as error:
        print(f"bench/learning.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def learn(text: Path, runs: Path, steps: int, name: str) -> tuple[float, Curve]:
    """The learning rate of a row that ends lowest, and its curve."""
    curves = {
        rate: curve_of(runs / f"{ROWS[name].keys['optim.name']}-x{ROWS[name].times}-{rate:g}", text, steps, ROWS[name], rate)
        for rate in ROWS[name].rates
    }
    for rate, curve in curves.items():
        print(f"{name}, learning rate {rate:g}: {curve[-1][1]:.3f} after step {curve[-1][0]}", flush=True)
    rate = min(curves, key=lambda rate: curves[rate][-1][1])
    return rate, curves[rate]


def curve_of(run: Path, text: Path, steps: int, row: Row, rate: float) -> Curve:
    total = steps // row.times
    keys = row.keys | {"optim.lr": rate, "optim.min_lr": rate / 10, "optim.warmup_steps": max(total // 10, 1), "optim.beta2": 0.95}
    keys |= {"train.steps": total, "train.global_batch": BATCH * row.times, "train.micro_batch": BATCH, "data.text": str(text)}
    keys |= {"train.eval_every": max(total // EVALUATIONS, 1), "train.eval_batches": max(32 // row.times, 2), "checkpoint.every": 0}
    options = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "teratron", "train", "shakespeare-char", "--run", str(run), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[2:])} ended with exit code {done.returncode}: {done.stdout[-1000:]}")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"]) for event in events if event["event"] == "eval"]


def race(rows: dict[str, Row], rounds: int = 7) -> dict[str, float]:
    """Seconds of a step of each row over those of one of AdamW at its batch, in turn."""
    engines = {name: (Engine(config_of(row), Mesh()), random_batch(config_of(row))) for name, row in rows.items()}
    for engine, _ in engines.values():
        engine.optimizer.initialise(0)
    laps: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + 1):  # the first warms up
        for name, (engine, batch) in engines.items():
            laps[name].append(seconds(partial(engine.step, batch, step=1, number=1, lr=1e-3), torch.device("cpu")))
    base = laps["adamw"][1:]
    return {name: median(own / first for own, first in zip(found[1:], base, strict=True)) for name, found in laps.items()}


def config_of(row: Row) -> Config:
    keys = row.keys | {"model.vocab_size": 65, "train.global_batch": BATCH * row.times, "train.micro_batch": BATCH}
    return Config.preset("shakespeare-char").override(keys)


def random_batch(config: Config) -> Batch:
    shape = (config.train.global_batch, config.model.seq_length)
    batch = {name: torch.randint(0, config.model.vocab_size, shape) for name in ("tokens", "targets")}
    positions = torch.arange(shape[1]).expand(shape)
    return batch | {"weights": torch.ones(shape), "positions": positions, "sample": torch.arange(shape[0])}


def loss_at(curve: Curve, step: float) -> float:
    """The held-out loss after a step, between evaluations by a straight line; that of the last one when the run has ended."""
    number = bisect_right([at for at, _ in curve], step)
    if number in (0, len(curve)):
        return curve[max(number - 1, 0)][1]
    (start, before), (stop, after) = curve[number - 1 : number + 1]
    return before + (after - before) * (step - start) / (stop - start)


def first_below(curve: Curve, loss: float) -> float | None:
    """The share of the run after which the held-out loss is at most so much; None = it never is."""
    return next((step / curve[-1][0] for step, found in curve if found <= loss), None)


def table(best: dict[str, tuple[float, Curve]], laps: dict[str, float], steps: int) -> Table:
    """A row's time is told in steps of AdamW at its batch."""
    target = best["adamw"][1][-1][1]
    grid = Table(title=f"held-out loss, {steps * BATCH * 64:,} characters each")
    grid.add_column("optimizer")
    for heading in ("learning rate", "steps", "at equal tokens", "tokens to AdamW's loss", "time of all, AdamW's = 1", "at equal time"):
        grid.add_column(heading, justify="right")
    for name, (rate, curve) in best.items():
        times = ROWS[name].times
        share, spent = first_below(curve, target), laps[name] / times
        grid.add_row(
            name,
            f"{rate:g}",
            f"{curve[-1][0]}",
            f"{curve[-1][1]:.3f}",
            f"{share:.0%}" if share else "never",
            f"{spent:.2f}",
            f"{loss_at(curve, curve[-1][0] / spent):.3f}",
        )
    return grid


if __name__ == "__main__":
    sys.exit(main())
