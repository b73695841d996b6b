"""`--nproc` of the verbs that run in several processes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from teratron.config import UserError
from teratron.parallel.restart import HANG_TIMEOUT

if TYPE_CHECKING:
    from teratron.parallel.restart import Care
    from teratron.parallel.worker import Worker


def add_nproc(parser: argparse.ArgumentParser, purpose: str) -> None:
    """purpose: what the processes are for, behind "processes to start on this machine"."""
    text = f"processes to start on this machine{purpose}; not with torchrun or srun (default: 1)"
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help=text)


def add_care(parser: argparse.ArgumentParser) -> None:
    """The options of a verb whose processes are started again."""
    text = "how often the run is started again from its newest checkpoint when a process dies or hangs; counted anew after a "
    parser.add_argument("--restarts", type=int, default=0, metavar="R", help=f"{text}newer checkpoint and after an hour (default: 0)")
    text = "with --restarts: go on with fewer processes, M at least, when N cannot be started any more (default: N)"
    parser.add_argument("--min-nproc", type=int, default=0, metavar="M", help=text)
    text = "with --nproc: end a run in which no process makes progress for so long; longer than a step or a save; 0 = never"
    parser.add_argument("--hang-timeout", type=float, default=HANG_TIMEOUT, metavar="SECONDS", help=f"{text} (default: {HANG_TIMEOUT:g})")


def check_care(args: argparse.Namespace) -> None:
    """Refuse what those options cannot be."""
    if args.restarts < 0:
        raise UserError(f"--restarts {args.restarts}: expected how often to start again at most, 0 or more")
    if args.min_nproc and not 1 <= args.min_nproc <= args.nproc:
        raise UserError(f"--min-nproc {args.min_nproc}: expected the fewest processes to go on with, 1 to --nproc {args.nproc}")
    if args.min_nproc and not args.restarts:
        raise UserError(f"--min-nproc {args.min_nproc} has no effect without restarts: add --restarts R, such as --restarts 10")
    if not args.hang_timeout >= 0:
        raise UserError(f"--hang-timeout {args.hang_timeout:g}: expected seconds, more than a step takes; 0 = never")


def run_workers(args: argparse.Namespace, care: Care | None = None, run: Path | None = None) -> int | None:
    """Start the processes that `--nproc` asks for and return their exit code; None = this process is to do the work.

    care: whether they are started again, and how. run: the folder that gets the stacks of those that hang.
    """
    from teratron.parallel.worker import launched, this_worker

    worker = this_worker()
    if worker is None and (args.nproc != 1 or (care is not None and care.restarts)):
        from teratron.parallel.launch import launch, own_command

        return launch(args.nproc, own_command(args.command_line), care, run)
    if worker is not None and not launched():
        _check_started(args, worker, care)
    return None


def _check_started(args: argparse.Namespace, worker: Worker, care: Care | None) -> None:
    """Refuse what is not for processes that somebody else has started."""
    if args.nproc not in (1, worker.local_world):
        raise UserError(
            f"--nproc {args.nproc}: torchrun or srun has started {worker.local_world} processes on this machine; leave --nproc out"
        )
    if care is not None and care.restarts:
        raise UserError(
            f"--restarts {care.restarts}: is for --nproc; leave it out, and start the same command again, as sbatch --requeue does"
        )
