"""`teratron train --dry-run`: what a step of one rank takes, without processes, data or weights."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from teratron.config import UserError


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The options of a dry run."""
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="train nothing: tell what a step of one rank takes, on any number of ranks")
    group.add_argument("--world", type=int, metavar="N", help="ranks in all (default: as few as the degrees ask for)")
    group.add_argument("--rank", type=int, metavar="R", help="the rank that is looked at (default: 0)")
    group.add_argument("--memory", type=float, metavar="GIB", help="memory of a device, to be told whether the step fits")
    group.add_argument("--expert-load", type=float, metavar="F", help="rows of this rank's experts over the mean of all (default: 1)")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file as well")


def dry_run_of(args: argparse.Namespace) -> bool:
    """Do the dry run that the options ask for, and print it; False = they ask for none. Raises `UserError` for options out of place."""
    _check(args)
    if not args.dry_run:
        return False
    from teratron.config import Config

    config = (Config.load(args.config) if args.config else Config()).override(args.overrides)  # before the slow import
    from teratron.parallel.offload import Home
    from teratron.plan.dryrun import dry_run
    from teratron.plan.dryrun_text import dry_run_json, dry_run_text
    from teratron.plan.layout import least_world
    from teratron.train.budget import within_budget
    from teratron.train.engine import Engine

    world = least_world(config.parallel) if args.world is None else args.world
    config, said = within_budget(config, world)
    if said:
        print(f"{said}\n")
    found = dry_run(config, world, args.rank or 0, partial(Engine, home=Home()), 1.0 if args.expert_load is None else args.expert_load)
    print(dry_run_text(found, args.memory))
    if args.json:
        args.json.write_text(dry_run_json(found), "utf-8")
    return True


def _check(args: argparse.Namespace) -> None:
    own = {"--world": args.world, "--rank": args.rank, "--memory": args.memory, "--expert-load": args.expert_load, "--json": args.json}
    given = [name for name, value in own.items() if value is not None]
    if not args.dry_run:
        if given:
            raise UserError(f"{given[0]} is about a dry run: add --dry-run, or leave {given[0]} out")
        if args.run is None:
            raise UserError("--run is missing: give the folder of the run, such as --run runs/first")
        return
    others = {"--nproc": args.nproc != 1, "--run": args.run is not None, "--fork": args.fork is not None}
    for name in (name for name, there in others.items() if there):
        instead = "; the number of ranks is --world" if name == "--nproc" else ""
        raise UserError(f"{name} with --dry-run, which is one process without a run folder: leave {name} out{instead}")
    if "RANK" in os.environ:
        raise UserError("--dry-run under torchrun or srun: it is one process, whatever --world is; start it alone")
    for name, value in (("--memory", args.memory), ("--expert-load", args.expert_load)):
        if value is not None and not value > 0:
            raise UserError(f"{name} {value:g}: expected a number above 0")
