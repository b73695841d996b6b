"""`teratron train`: pretrain a model, or go on with a run."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from teratron.cli.workers import add_nproc, run_workers

SUMMARY = "train a model from text or prepared data; the same command continues a run"
TAKES_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a preset's name or a TOML file; default: the config of --run, else the defaults below")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: config, metrics, checkpoints, report")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_nproc(parser, "")
    parser.add_argument(
        "--fork", type=Path, metavar="NEWDIR", help="branch off: start NEWDIR from the newest checkpoint of --run, with other keys"
    )


def run(args: argparse.Namespace) -> int:
    from teratron.config import Config

    saved = args.run / "config.toml"
    base = Config.load(args.config) if args.config else Config.load(saved) if saved.is_file() else Config()
    config = base.override(args.overrides)  # before the slow import, so that a wrong key is refused at once
    if args.nproc > 1:
        from teratron.train.engine import check_degrees

        check_degrees(config, args.nproc)
    code = run_workers(args)
    if code is not None:
        return code
    from teratron.train import Trainer
    from teratron.train.commands import program

    trainer = Trainer(config, args.run, device=args.device, fork_to=args.fork)
    trainer.console.say(trainer.config.describe())
    result = trainer.train()
    folder = shlex.quote(str(trainer.run))
    if result.interrupted:
        trainer.console.say(f"stopped at step {result.step} of {trainer.config.train.steps}; to go on: {program()} train --run {folder}")
        return 130
    trainer.console.say(f"done: {result.step} steps; report in {trainer.run / 'report.html'}; try: {program()} generate {folder}")
    return 0
