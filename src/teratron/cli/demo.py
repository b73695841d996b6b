"""`teratron demo`: the main job, small, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "train a small GPT on Python's own source in a few minutes: tokenizer, data, training, samples, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the demo (default: runs/demo)")
    parser.add_argument("--minutes", type=float, metavar="N", help="about how long to train, in a new folder (default: 3)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def run(args: argparse.Namespace) -> int:
    from teratron.tasks.demo import demo

    return 130 if demo(args.output, args.minutes, args.device).interrupted else 0
