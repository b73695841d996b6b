"""`python bench/gpu.py`: checks the fast paths of a GPU against the CPU, times training on it, and prints one table last.

    python bench/gpu.py [--json gpu.json] [--steps 10] [--only checks|times]
    python bench/gpu.py --device cpu --tiny      # all of it small, which only shows that it runs

Takes no network. What fails or runs out of memory is a row that says so; the exit code is 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_checks import Check, checks
from gpu_times import Time, times
from machine import facts
from rich.console import Console
from rich.table import Table

from teratron.config import UserError
from teratron.parallel.device import choose_device
from teratron.train.breakdown import KINDS

NOMINAL = 989e12
"""bfloat16 operations a second of an H100 or H200 without sparsity, by its maker; MFU is a share of this."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in a minute, nothing compiled")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a row (default: 10)")
    parser.add_argument("--only", choices=("checks", "times"), help="one half")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # looked at once, before the first product: one check needs it
    try:
        device = choose_device(args.device)
    except UserError as error:
        print(f"bench/gpu.py: error: {error}", file=sys.stderr)
        return 2
    checked = {} if args.only == "times" else {name: attempt(name, run) for name, run in checks(device, args.tiny)}
    timed = {} if args.only == "checks" else {name: attempt(name, run) for name, run in times(device, args.tiny, args.steps)}
    if args.json:
        args.json.write_text(json.dumps(record(device, checked, timed), indent=1) + "\n", "utf-8")
    Console(width=160).print(*tables(checked, timed), sep="\n")
    return int(not all(isinstance(found, Check) and found.good for found in checked.values()))


def attempt(name: str, run: Callable[[], Any]) -> Any:
    """What a row finds, or in a sentence why it finds nothing: the next ones still run."""
    print(name, flush=True)
    try:
        return run()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # one row must not cost the others
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def tables(checked: dict[str, Any], timed: dict[str, Any]) -> list[Table]:
    """Checks, then speeds."""
    first = Table("check", "difference", "allowed", "", title="fast paths against their twins")
    for name, found in checked.items():
        good = isinstance(found, Check)
        first.add_row(
            name, *([f"{found.difference:.2g}", f"{found.allowed:.2g}", "ok" if found.good else "FAILS"] if good else ["", "", found])
        )
    shown = {
        kind: KINDS[kind] for kind in KINDS if any(isinstance(time, Time) and time.kinds and time.kinds[kind] for time in timed.values())
    }
    second = Table("what", "TFLOP/s", "of 989", "tokens/s", "peak GiB", *shown.values(), title="speed; shares of a traced step")
    for name, found in timed.items():
        second.add_row(*(cells(found, list(shown)) if isinstance(found, Time) else [name, found]))
    return [first, second]


def cells(time: Time, kinds: list[str]) -> list[str]:
    speed = [f"{time.flops / 1e12:,.3g}", f"{time.flops / NOMINAL:.1%}"]
    step = [f"{time.tokens_per_second:,.0f}", f"{time.memory / 2**30:.1f}"] if time.tokens_per_second else ["", ""]
    whole = sum(time.kinds.values()) if time.kinds else 1.0
    return [time.name, *speed, *step, *(f"{time.kinds[kind] / whole:.0%}" if time.kinds else "" for kind in kinds)]


def record(device: torch.device, checked: dict[str, Any], timed: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain numbers; sentences where there are none."""
    rows = {name: asdict(found) if isinstance(found, Time) else found for name, found in timed.items()}
    differences = {name: {**asdict(found), "good": found.good} if isinstance(found, Check) else found for name, found in checked.items()}
    return {**facts(device.type), "checks": differences, "times": rows}


if __name__ == "__main__":
    sys.exit(main())
