"""`python bench/shakespeare.py --text FILE`: seconds to a loss of Shakespeare's whole validation split, over nanoGPT's CPU recipe.

Both start as a user starts them, start-up and preparation included. This project is `teratron train PRESET`, whole; nanoGPT's
recipe (`contenders/nanogpt_shakespeare.py`) ends where the loss is first reached, and the looks at it do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import add_line, facts
from rich.console import Console
from rich.table import Table

from teratron.config import UserError
from teratron.train.history import read_history

BENCH = Path(__file__).resolve().parent


def main() -> int:
    args = _parse()
    try:
        rows = [run(args.text, args.preset, args.loss, int(seed), args.threads) for seed in args.seeds.split(",")]
        Console().print(table(rows, args.loss))
        if args.json:
            add_line(args.json, {**facts("cpu"), "threads": args.threads, "preset": args.preset, "loss": args.loss, "rows": rows})
    except UserError as error:
        print(f"bench/shakespeare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="the plays in one file, tiny Shakespeare's input.txt")
    parser.add_argument("--preset", default="shakespeare-fast", help="this project's recipe (default: %(default)s)")
    parser.add_argument("--loss", type=float, default=1.89, help="what is to be reached (default: %(default)s)")
    parser.add_argument("--seeds", default="1,2,3", help="a run of both for each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    return parser.parse_args()


def run(text: Path, preset: str, loss: float, seed: int, threads: int) -> dict[str, Any]:
    """Both in turn. Raises `UserError` when one of them fails."""
    if not text.is_file():
        raise UserError(f"--text {text}: there is no such file; expected tiny Shakespeare's input.txt")
    with tempfile.TemporaryDirectory() as folder:
        ours = teratron(text.resolve(), preset, Path(folder) / "run", seed, threads)
        theirs = nanogpt(text.resolve(), Path(folder), loss, seed, threads)
    return {"seed": seed, "teratron": ours, "nanogpt": theirs}


def teratron(text: Path, preset: str, run: Path, seed: int, threads: int) -> dict[str, float]:
    """Seconds of the whole command, and the held-out loss that it ended with."""
    command = ["-m", "teratron", "train", preset, "--data.text", str(text), "--run", str(run), "--train.seed", str(seed), "--device", "cpu"]
    seconds, _ = timed(command, threads)
    history = read_history(run / "metrics.jsonl")
    return {"seconds": seconds, "loss": history.of_kind("eval")[-1]["loss"], "steps": history.last("step")}


def nanogpt(text: Path, folder: Path, loss: float, seed: int, threads: int) -> dict[str, float]:
    """Seconds to the loss, or of the whole recipe; steps and loss where it ended."""
    command = ["-m", "contenders.nanogpt_shakespeare", str(text), str(folder), str(loss), str(seed)]
    seconds, output = timed(command, threads)
    end = json.loads(output.splitlines()[-1])
    return {"seconds": seconds - end["still"], "loss": end["loss"], "steps": end["steps"]}


def timed(command: list[str], threads: int) -> tuple[float, str]:
    """Seconds and output of a command of this Python. Raises `UserError` when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(BENCH)}
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def table(rows: list[dict[str, Any]], loss: float) -> Table:
    """A row a seed, the median of the ratios last."""
    grid = Table(title=f"Tiny Shakespeare: whole validation split to a loss of {loss}", caption="+ = never reached, the whole recipe")
    for heading in ("seed", "teratron, s", "steps", "loss", "nanoGPT, s", "steps", "loss", "share of the time"):
        grid.add_column(heading, justify="right")
    for row in rows:
        cells = [str(row["seed"])]
        for name in ("teratron", "nanogpt"):
            one = row[name]
            cells += [f"{one['seconds']:.1f}{'+' * (one['loss'] > loss)}", f"{one['steps']:.0f}", f"{one['loss']:.3f}"]
        grid.add_row(*cells, f"{share(row):.2f}")
    grid.add_section()
    grid.add_row("median", *[""] * 6, f"{median(map(share, rows)):.2f}", style="bold")
    return grid


def share(row: dict[str, Any]) -> float:
    """Our seconds over theirs."""
    return row["teratron"]["seconds"] / row["nanogpt"]["seconds"]


if __name__ == "__main__":
    sys.exit(main())
