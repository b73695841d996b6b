"""`teratron sweep`: many trials of a config, and which is best."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from teratron.cli.workers import add_nproc

if TYPE_CHECKING:
    from rich.table import Table

    from teratron.tasks.sweep import Sweep

SUMMARY = "train many variants of a config, here or on several machines, and tell the best; the same command goes on with it"
TAKES_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a preset's name or a TOML file; default: the defaults below")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the sweep: a run a trial, sweep.html, best.toml")
    text = "a key and its values: A,B,C or LOW..HIGH, with :log and with :N for N points of a grid; may be given many times"
    parser.add_argument("--over", action="append", default=[], metavar="KEY=VALUES", help=text)
    methods = "grid = all combinations; random = --trials of them; halving = of many the best go on (default: grid, with --trials random)"
    parser.add_argument("--method", choices=("grid", "random", "halving"), help=methods)
    parser.add_argument(
        "--trials", type=int, default=0, metavar="N", help="how many trials, spread at random over the values; 0 = the grid"
    )
    parser.add_argument("--eta", type=int, default=3, help="of a round of halving the best 1/eta goes on, eta times as far (default: 3)")
    metric = "what is compared, lowest first: valid_loss or loss, of the last 5 %% of the steps (default: valid_loss)"
    parser.add_argument("--metric", choices=("valid_loss", "loss"), default="valid_loss", help=metric)
    parser.add_argument("--seed", type=int, default=1234, help="of the random spread (default: 1234)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at the same time on a machine (default: 1)")
    machines = "names that ssh knows, with commas: trials run there, and see the same folders under the same names (default: this machine)"
    parser.add_argument("--machines", metavar="A,B", help=machines)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda, of which each job then has --nproc for itself (default: auto)")
    add_nproc(parser, " for each trial")


def run(args: argparse.Namespace) -> int:
    from teratron.config import Config

    config = (Config.load(args.config) if args.config else Config()).override(args.overrides)
    _check(args)
    from teratron.data.pool import cores
    from teratron.tasks.sweep import Plan, Sweep
    from teratron.tasks.sweep_jobs import slots_of

    method = args.method or ("random" if args.trials else "grid")
    plan = Plan(config, tuple(args.over), method, args.trials, args.metric, args.eta, args.seed)
    machines = [name.strip() for name in (args.machines or "").split(",") if name.strip()]
    slots = slots_of(machines, args.jobs, args.nproc, args.device, cores())
    sweep = Sweep(plan, args.run, slots, args.nproc, args.device)
    try:
        return _run(sweep)
    finally:
        sweep.close()


def _check(args: argparse.Namespace) -> None:
    from teratron.config import UserError

    if not args.over:
        raise UserError("--over is missing: name a key and its values, such as --over optim.lr=1e-4..1e-2:log:5")
    for name, least in (("trials", 0), ("jobs", 1), ("nproc", 1), ("eta", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {least}")
    if args.method == "random" and not args.trials:
        raise UserError("--method random needs to know how many: add --trials N")
    if args.method == "grid" and args.trials:
        raise UserError(f"--method grid tries all combinations: leave --trials {args.trials} out, or take --method random")
    given = next((text for text in args.over if text.partition("=")[0] in args.overrides), None)
    if given:
        raise UserError(f"--over {given}: --{given.partition('=')[0]} is given too: keep one of them")


def _run(sweep: Sweep) -> int:
    from rich.console import Console
    from rich.live import Live

    console = Console(soft_wrap=True)
    tried = ", ".join(f"{count} up to step {until}" if until else f"{count}" for count, until in sweep.rounds)
    console.print(f"{sweep.plan.method}, trials: {tried}; {len(sweep.slots)} at a time", highlight=False)
    if sys.stdout.isatty():
        with Live(_table(sweep), console=console, auto_refresh=False) as live:
            code = sweep.run(
                lambda line: console.print(line, highlight=False, markup=False), lambda: live.update(_table(sweep), refresh=True)
            )
    else:
        code = sweep.run(lambda line: print(line, flush=True), lambda: None)
        console.print(_table(sweep))
    if not code:
        print(f"{sweep.write_best()}\npicture: {sweep.folder / 'sweep.html'}")
    return code


def _table(sweep: Sweep) -> Table:
    from rich.table import Table

    from teratron.tasks.sweep_page import rows_of

    table = Table(*["", "trial", *sweep.points[0], sweep.plan.metric, "steps", "time", ""], box=None)
    running = {job.trial: job.progress() for job in sweep.jobs}
    for row in rows_of(sweep, sweep.best_first(range(len(sweep.points)))):
        event = running.get(int(row[1]))
        now = f"step {event.get('step', 0)}, loss {event.get('loss') or float('nan'):.4f}" if event is not None else row[-1]
        table.add_row(*row[:-1], now)
    return table
