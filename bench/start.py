"""`python bench/start.py`: how long a user waits for help, for an import, and for the first training step; medians, in turn."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

from machine import add_line, facts
from rich.console import Console
from rich.table import Table

from teratron.config import UserError

TRAIN_OPTIONS = "--device cpu --train.steps 1 --train.eval_batches 1 --optim.warmup_steps 1 --log.no-tensorboard"
TEXT_BYTES = 2**20
LIMITS = {"teratron --help": 0.7, "import teratron, over torch": 0.3, "teratron train, to its first step": 6.0}
"""Seconds that each is promised to stay under."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are over them (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected at least 1")
    try:
        seconds = measure(args.repeats)
        Console().print(table(seconds))
        if args.json:
            add_line(args.json, {**facts("cpu"), "seconds": seconds})
    except UserError as error:
        print(f"bench/start.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times in turn; one more round before warms the disk's cache and is dropped."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(some_text(TEXT_BYTES), "utf-8")
        cases: dict[str, Callable[[], float]] = {
            "teratron --help": partial(wall, [sys.executable, "-m", "teratron", "--help"]),
            "import torch": partial(wall, [sys.executable, "-c", "import torch"]),
            "import torch, teratron": partial(wall, [sys.executable, "-c", "import torch, teratron"]),
            "teratron train, to its first step": partial(first_step, text),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(repeats + 1):
            for name, case in cases.items():
                found = case()
                if turn:
                    seconds[name].append(found)
    pairs = zip(seconds["import torch, teratron"], seconds["import torch"], strict=True)
    seconds["import teratron, over torch"] = [both - alone for both, alone in pairs]
    return seconds


def wall(command: list[str]) -> float:
    """Seconds from starting a command to its end. Raises `UserError` with its last line when it fails."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"`{' '.join(command)}` ended with exit code {done.returncode}: {lines[-1]}")
    return seconds


def first_step(text: Path) -> float:
    """Seconds from typing `teratron train shakespeare-char` on raw text to the end of the first step, preparation included."""
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "-m", "teratron", "train", "shakespeare-char", "--data.text", str(text), "--run", run]
        begun = time.time()
        wall([*command, *TRAIN_OPTIONS.split()])
        events = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
        return next(event["time"] for event in events if event["event"] == "step") - begun


def some_text(size: int) -> str:
    """About `size` characters that every machine has: modules of the running Python's standard library."""
    pieces: list[str] = []
    total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        pieces.append(path.read_text("utf-8", errors="ignore"))
        total += len(pieces[-1])
        if total >= size:
            break
    return "".join(pieces)[:size]


def table(seconds: Mapping[str, list[float]]) -> Table:
    """Median, fastest and slowest of each case, and what is promised."""
    grid = Table(title="Waiting times", caption=f"medians of {len(seconds['import torch'])}; load {os.getloadavg()[0]:.1f}")
    grid.add_column("case")
    for heading in ("median s", "fastest", "slowest", "promised"):
        grid.add_column(heading, justify="right")
    for name, found in seconds.items():
        promise = f"< {LIMITS[name]:g}" if name in LIMITS else ""
        grid.add_row(name, f"{median(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}", promise)
    return grid


if __name__ == "__main__":
    sys.exit(main())
