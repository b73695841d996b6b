"""`teratron eval`: how well a model does on tasks."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teratron.cli.finetune import columns_of
from teratron.cli.parser import given
from teratron.cli.workers import add_nproc, run_workers
from teratron.config import UserError, nearest

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from teratron.tasks.evaluate import Report, Task
    from teratron.tasks.evaluate.likelihood import Scorer

SUMMARY = "measure a model on tasks: perplexity, LAMBADA, multiple choice ..., with confidence intervals and a report"

UNUSED = {
    "--nproc": "runs in one process",
    "--precision": "computes with the numbers that it was trained with",
    "--tokenizer": "reads with the tokenizer that it was trained with",
}
"""What the task of a fine-tuned run does not take, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run folder, a checkpoint folder or a Hugging Face folder")
    parser.add_argument(
        "tasks",
        nargs="+",
        metavar="TASK",
        help="perplexity, lambada, choice, or the one that the model was fine-tuned for; see docs/eval.md",
    )
    text = "what to measure on: of one TASK any number, of several as many as these, in their order"
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="FILE", help=text)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write eval.json and eval.html there (default: print only)")
    text = "where a fine-tuned model's task finds its columns, if their names are unusual: text=review"
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help=text)
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="take the first N examples of each file; 0 = all (default: 0)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="texts that go through the model at the same time (default: 16)")
    text = "of perplexity: tokens that a window advances, not those that it shares (default: half a window)"
    parser.add_argument("--stride", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--detokenise", metavar="HOW", help="of perplexity: wikitext joins the words of WikiText again (default: leave)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws for the confidence intervals (default: 0)")
    parser.add_argument("--tokenizer", metavar="T", help="tokenizer file, folder or `bytes`, instead of the model's own")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="numbers of weights and activations (default: fp32; fp64 as trained)")
    add_nproc(parser, " that share the model")


def run(args: argparse.Namespace) -> int:
    _check(args)
    code = run_workers(args)
    if code is not None:
        return code
    from teratron.generate import open_source
    from teratron.generate.ranks import joined
    from teratron.parallel.worker import this_worker
    from teratron.tasks.evaluate.likelihood import ModelScorer

    jobs = _jobs(args)
    worker = this_worker()
    leads = worker is None or worker.rank == 0
    with joined(worker, args.device) as (mesh, device):
        scores = any(task is not None for _, task, _ in jobs)
        loaded = open_source(args.model, device, args.precision, args.tokenizer, mesh) if scores else None
        scorer = ModelScorer(loaded, args.batch) if loaded is not None else None
        reports = [_evaluate(*job, scorer, args, leads, device) for job in jobs]
    if leads:
        _tell(reports, args.model, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse, before the slow imports, what needs no model to be refused."""
    for name, least in (("limit", 0), ("batch", 1), ("stride", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {least}")
    if len(args.tasks) not in (1, len(args.data)):
        raise UserError(
            f"{len(args.tasks)} tasks and {len(args.data)} files under --data: expected a file for each task, in the same order"
        )
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, expected a folder")
    _check_use(args)


def _check_use(args: argparse.Namespace) -> None:
    """Refuse names of no task, and options that would change nothing."""
    from teratron.tasks import finetune
    from teratron.tasks.evaluate import TASKS

    known = [*TASKS, *finetune.TASKS]
    unknown = next((name for name in args.tasks if name not in known), None)
    if unknown is not None:
        raise UserError(f"there is no task '{unknown}'{nearest(unknown, known)}: expected {', '.join(known)}")
    own, options = next((name for name in args.tasks if name not in TASKS), None), given(args)
    for option, reason in UNUSED.items():
        if own is not None and option in options:
            raise UserError(f"{option}: {own}, the task of a fine-tuned run, {reason}: leave {option} out")
    for option in ("--stride", "--detokenise"):
        if option in options and "perplexity" not in args.tasks:
            raise UserError(f"{option}: concerns perplexity alone, not {' or '.join(args.tasks)}: leave it out")
    if own is None and args.columns:
        raise UserError(f"--columns: concerns the task of a fine-tuned run, {' and '.join(args.tasks)} find theirs by shape: leave it out")


def _jobs(args: argparse.Namespace) -> list[tuple[str, Task | None, Path]]:
    """Each task by name, ready for its file; None = the model's own, for which it was fine-tuned."""
    from teratron.tasks.evaluate import TASKS, Options

    options = Options(args.stride, args.detokenise or "")
    names = args.tasks * len(args.data) if len(args.tasks) == 1 else args.tasks
    return [(name, TASKS[name](options) if name in TASKS else None, file) for name, file in zip(names, args.data, strict=True)]


def _evaluate(
    name: str, task: Task | None, file: Path, scorer: Scorer | None, args: argparse.Namespace, leads: bool, device: torch.device
) -> Report:
    from teratron.tasks.evaluate import evaluate
    from teratron.tasks.evaluate.finetuned import evaluate_run

    if task is None or scorer is None:
        return evaluate_run(name, Path(args.model), file, columns_of(args.columns), args.limit, args.seed, args.batch, device)
    with _bar(f"{name} {file.name}", leads) as done:
        return evaluate(name, task, file, scorer, args.limit, args.seed, done)


@contextlib.contextmanager
def _bar(title: str, leads: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal, of one rank."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (leads and console.is_terminal)) as bar:
        yield functools.partial(bar.advance, bar.add_task(title, total=1.0))


def _tell(reports: Sequence[Report], model: str, out: Path | None) -> None:
    from rich.console import Console

    from teratron.tasks.evaluate.page import fact_texts

    console = Console(highlight=False, soft_wrap=True)
    for report in reports:
        console.print(f"{report.task} {report.file}", style="bold", markup=False)
        console.print(", ".join(fact_texts(report)), style="dim", markup=False)
        console.print(_table(report))
    if out is None:
        return
    from teratron.tasks.evaluate.page import write_page
    from teratron.tasks.evaluate.report import write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(reports, model, out / "eval.json")
    write_page(reports, model, out / "eval.html")
    print(f"report: {out / 'eval.html'}")


def _table(report: Report) -> Table:
    from rich.table import Table

    from teratron.tasks.evaluate.page import shown

    table = Table("", "value", "95 % interval", box=None)
    for name, found in report.metrics.items():
        table.add_row(name, shown(found.value), f"{shown(found.low)} to {shown(found.high)}")
    return table
