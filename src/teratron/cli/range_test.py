"""`teratron range-test`: which learning rate suits a config."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from teratron.cli.workers import add_nproc

SUMMARY = "find a learning rate: one short run in which it rises until the loss diverges"
TAKES_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a preset's name or a TOML file; default: the defaults below")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the test: its run, range.html")
    parser.add_argument("--from", type=float, default=1e-6, dest="low", metavar="LR", help="first learning rate (default: 1e-6)")
    parser.add_argument("--to", type=float, default=1.0, dest="high", metavar="LR", help="last learning rate (default: 1)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps from one to the other (default: 200)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_nproc(parser, "")


def run(args: argparse.Namespace) -> int:
    from teratron.config import Config, UserError
    from teratron.tasks.range_test import SET, range_config, range_test, tell
    from teratron.train.commands import program

    given = next((name for name in SET if name in args.overrides), None)
    if given:
        raise UserError(f"--{given}: the test sets it itself: leave it out; --from, --to and --steps say how far it goes")
    config = range_config((Config.load(args.config) if args.config else Config()).override(args.overrides), args.low, args.high, args.steps)
    found, code = range_test(config, args.run, args.nproc, args.device, lambda line: print(line, flush=True))
    if code:
        print(f"stopped; to go on: {program()} {shlex.join(args.command_line)}")
        return code
    print("\n".join(tell(found)))
    print(f"picture: {args.run / 'range.html'}")
    return 0
