"""`teratron train`: pretrain a model, or go on with a run."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from teratron.cli.dryrun import add_dry_run, dry_run_of
from teratron.cli.workers import add_care, add_nproc, check_care, run_workers

if TYPE_CHECKING:
    from teratron.config import Config

SUMMARY = "train a model from text or prepared data; the same command continues a run"
TAKES_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a preset's name or a TOML file; default: the config of --run, else the defaults below")
    parser.add_argument("--run", type=Path, help="folder of the run: config, metrics, checkpoints, report")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_nproc(parser, "")
    add_care(parser)
    parser.add_argument(
        "--fork", type=Path, metavar="NEWDIR", help="branch off: start NEWDIR from the newest checkpoint of --run, with other keys"
    )
    add_dry_run(parser)


def run(args: argparse.Namespace) -> int:
    from teratron.config import Config

    if dry_run_of(args):
        return 0
    base = Config.load(args.config) if args.config else _own_config(args.run)
    config = base.override(args.overrides)  # before the slow import, so that a wrong key is refused at once
    check_care(args)
    if args.nproc > 1:
        from teratron.train.engine import check_degrees

        check_degrees(config, args.nproc)
    code = _run_workers(args, config)
    if code is not None:
        return code
    from teratron.tasks.evaluate.training import examiner
    from teratron.train import Trainer
    from teratron.train.commands import program

    trainer = Trainer(config, args.run, device=args.device, fork_to=args.fork, examiner=examiner)
    trainer.console.say(trainer.config.describe())
    result = trainer.train()
    folder = shlex.quote(str(trainer.run))
    if result.interrupted:
        again = f"{program()} train --run {folder}" + (f" --nproc {args.nproc}" if args.nproc > 1 else "")
        if trainer.mesh.world > args.nproc:
            again = "start the same command again"
        trainer.console.say(f"stopped at step {result.step} of {trainer.config.train.steps}; to go on: {again}")
        return result.stopped
    writes = trainer.config.model.family == "gpt" and trainer.config.model.head == "language"
    more = f"; try: {program()} generate {folder}" if writes else ""
    trainer.console.say(f"done: {result.step} steps; report in {trainer.run / 'report.html'}{more}")
    return 0


def _run_workers(args: argparse.Namespace, config: Config) -> int | None:
    """Have other processes do it where they are to; None = this one is."""
    if args.nproc == 1 and not args.restarts:
        return run_workers(args)
    from teratron.train.care import care_of

    home = args.fork or args.run
    care = care_of(config, home, args.device, restarts=args.restarts, min_nproc=args.min_nproc, hang_timeout=args.hang_timeout)
    return run_workers(args, care, home)


def _own_config(run: Path) -> Config:
    """What a run goes on with; the defaults for a new one."""
    from teratron.config import Config

    path = run / "config.toml"
    if path.is_file() and path.stat().st_size:
        return Config.load(path)
    if not (run / "checkpoints").is_dir():
        return Config()
    from teratron.train.run import run_config  # only then: it loads torch

    return run_config(run)
