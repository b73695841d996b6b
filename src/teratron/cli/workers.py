"""`--nproc` of the verbs that run in several processes."""

from __future__ import annotations

import argparse

from teratron.config import UserError


def add_nproc(parser: argparse.ArgumentParser, purpose: str) -> None:
    """purpose: what the processes are for, behind "processes to start on this machine"."""
    text = f"processes to start on this machine{purpose}; not with torchrun or srun (default: 1)"
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help=text)


def run_workers(args: argparse.Namespace) -> int | None:
    """Start the processes that `--nproc` asks for and return their exit code; None = this process is to do the work."""
    from teratron.parallel.worker import this_worker

    worker = this_worker()
    if worker is None and args.nproc != 1:
        from teratron.parallel.launch import launch, own_command

        return launch(args.nproc, own_command(args.command_line))
    if worker is not None and args.nproc not in (1, worker.local_world):
        raise UserError(
            f"--nproc {args.nproc}: torchrun or srun has started {worker.local_world} processes on this machine; leave --nproc out"
        )
    return None
