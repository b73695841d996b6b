"""`teratron finetune`: a pretrained model learns a task."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teratron.cli.workers import add_care, add_nproc, check_care
from teratron.config import UserError

if TYPE_CHECKING:
    from teratron.tasks.finetune.prepare import Job

SUMMARY = "fine-tune a model for a task (classify, tag, answer, choose, seq2seq, chat, embed, prefer), and judge it"
TAKES_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help="classify, tag, answer, choose, seq2seq, chat, embed or prefer; see docs/tasks.md")
    parser.add_argument(
        "--model", type=Path, required=True, help="what to begin with: a run, checkpoint, weights file or Hugging Face folder"
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="examples to learn from")
    parser.add_argument("--valid", type=Path, nargs="+", default=[], metavar="FILE", help="examples held out (default: a tenth of --data)")
    parser.add_argument(
        "--test", type=Path, nargs="+", default=[], metavar="FILE", help="examples that judge at the end (default: --valid)"
    )
    parser.add_argument("--tokenizer", metavar="T", help="tokenizer file, folder or `bytes`, instead of the model's own")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; the same command goes on there")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="where columns have unusual names: text=review")
    parser.add_argument("--epochs", type=float, default=3.0, help="times that each example is seen at most (default: 3)")
    parser.add_argument("--length", type=int, default=0, help="longest sequence, in tokens (default: what the examples need)")
    text = "tokens that pieces of a long document share, not those that they advance (default: it is cut off)"
    parser.add_argument("--stride", type=int, default=0, help=text)
    parser.add_argument("--class-weights", choices=("none", "balanced"), default="none", help="balanced: rare classes weigh more")
    parser.add_argument(
        "--target-length", type=int, default=0, metavar="N", help="longest text to write, in tokens (default: 128, if there is room)"
    )
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="write predictions by beam search (default: the likeliest token)")
    parser.add_argument(
        "--template", default="auto", help="of conversations: text, plain, chatml, llama2, llama3 (default: by the tokenizer)"
    )
    parser.add_argument("--pack", action="store_true", help="put several conversations into one example")
    parser.add_argument("--group", type=int, default=16, metavar="G", help="pairs that embed tells apart from each other (default: 16)")
    parser.add_argument("--freeze", type=int, default=0, metavar="N", help="the first N blocks and the embeddings do not learn")
    parser.add_argument("--layer-decay", type=float, default=1.0, metavar="F", help="each block learns F times as fast as the next one")
    parser.add_argument("--scratch", action="store_true", help="draw the weights anew: what pretraining is worth")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="K runs, RUN/seed-1 ..., and their mean and deviation")
    parser.add_argument("--prepare", action="store_true", help="only prepare, for `torchrun ... teratron train RUN/examples/config.toml`")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_nproc(parser, "")
    add_care(parser)


def run(args: argparse.Namespace) -> int:
    check_care(args)
    if not os.environ.keys().isdisjoint({"RANK", "SLURM_PROCID"}):
        raise UserError(
            "finetune prepares in one process: run it with --prepare, start torchrun or srun with "
            f"`teratron train {args.run}/examples/config.toml --run {args.run}`, and then this command once more for the scores"
        )
    job = _job(args)
    from teratron.parallel.device import choose_device
    from teratron.tasks.finetune.prepare import prepare
    from teratron.tasks.finetune.run import finetune

    if args.prepare:
        print(f"prepared: teratron train {prepare(job, args.run, print).file} --run {args.run}")
        return 0
    return finetune(job, args.run, lambda config, run: _train(args, config, run), choose_device(args.device))


def _train(args: argparse.Namespace, config: Path, run: Path) -> int:
    from teratron.cli.main import main

    care = ["--restarts", args.restarts, "--min-nproc", args.min_nproc, "--hang-timeout", args.hang_timeout]
    return main(["train", *map(str, [config, "--run", run, "--device", args.device, "--nproc", args.nproc, *care])])


def _job(args: argparse.Namespace) -> Job:
    from teratron.config import nearest
    from teratron.tasks.finetune import TASKS
    from teratron.tasks.finetune.prepare import Job
    from teratron.tasks.finetune.task import Options

    if args.task not in TASKS:
        raise UserError(f"unknown task '{args.task}'{nearest(args.task, TASKS)}; tasks: {', '.join(TASKS)}")
    if args.epochs <= 0 or args.seeds < 1:
        raise UserError(f"--epochs {args.epochs:g}, --seeds {args.seeds}: expected more than 0")
    if args.prepare and args.seeds > 1:
        raise UserError(
            f"--prepare --seeds {args.seeds}: prepares one run: leave --seeds out, and give each seed its own --run and --train.seed"
        )
    names = ("task", "model", "tokenizer", "epochs", "freeze", "layer_decay", "scratch", "seeds", "overrides")
    options = Options(**{option.name: getattr(args, option.name) for option in fields(Options) if option.name != "seed"})
    chosen: dict[str, Any] = {name: getattr(args, name) for name in names}
    chosen |= {name: tuple(getattr(args, name)) for name in ("data", "valid", "test")}
    return Job(**chosen, options=options, columns=columns_of(args.columns))


def columns_of(items: Sequence[str]) -> dict[str, str]:
    """What `--columns` says: columns by the role that they have in a task."""
    pairs = [item.partition("=") for item in items]
    wrong = next((item for item, pair in zip(items, pairs, strict=True) if not (pair[0] and pair[2])), None)
    if wrong is not None:
        raise UserError(f"--columns {wrong}: expected ROLE=COLUMN, such as text=review")
    return {role: column for role, _, column in pairs}
