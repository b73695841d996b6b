"""`teratron inspect`: what is inside a checkpoint, or which rank holds what and what the schedules do in a run that has yet to start."""

from __future__ import annotations

import argparse
from pathlib import Path

from teratron.config import UserError

SUMMARY = "say what a checkpoint holds, and whether it is undamaged; or draw how a config lies on ranks, or its schedules"
TAKES_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT", nargs="?", help="a checkpoint folder, or a run folder (its newest one)")
    parser.add_argument("--all", action="store_true", help="a line for every tensor, instead of one for parts that are alike")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum (reads all of them)")
    parser.add_argument("--layout", metavar="CONFIG", help="draw a preset or TOML file (keys may follow) on ranks instead")
    parser.add_argument("--schedule", metavar="CONFIG", help="draw its learning rate, weight decay and batch over the run instead")
    parser.add_argument(
        "--nproc", "--world", type=int, dest="world", metavar="N", help="ranks to draw it on (default: as few as the degrees ask for)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the drawing to this file as well")


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.schedule:
        return _schedule(args)
    return _layout(args) if args.layout else _checkpoint(args)


def _check(args: argparse.Namespace) -> None:
    """Refuse options of the other parts."""
    given = {"--all": args.all, "--verify": args.verify, "CHECKPOINT": args.source}
    drawing = {"--nproc": args.world, "--svg": args.svg, "--section.key": args.overrides}
    name, config = ("--layout", args.layout) if args.layout else ("--schedule", args.schedule)
    if config and any(given.values()):
        wrong = next(name for name, value in given.items() if value)
        raise UserError(f"inspect {name} {config} draws a config, and {wrong} is about a checkpoint: leave one of them out")
    if args.schedule and (args.layout or args.world is not None):
        wrong = "--layout" if args.layout else "--nproc"
        raise UserError(f"inspect --schedule {args.schedule} is the same on any ranks, and {wrong} is about them: leave one of them out")
    if not config and any(value or value == 0 for value in drawing.values()):
        wrong = next(name for name, value in drawing.items() if value or value == 0)
        raise UserError(f"{wrong} is about a drawing: give a preset or TOML file with --layout or --schedule, or leave {wrong} out")
    if not config and args.source is None:
        raise UserError("nothing to inspect: give a checkpoint or run folder, or a preset or TOML file with --layout or --schedule")


def _checkpoint(args: argparse.Namespace) -> int:
    from teratron.checkpoint import find_checkpoint
    from teratron.checkpoint.describe import describe_checkpoint

    checkpoint = find_checkpoint(Path(args.source), verify=False)
    print("\n".join(describe_checkpoint(checkpoint, args.all)))
    if args.verify:
        checkpoint.verify()
        count = len(checkpoint.manifest["files"])
        print(f"\nchecksums: {count:,} file{'s' if count > 1 else ''} compared, all as written")
    return 0


def _schedule(args: argparse.Namespace) -> int:
    from teratron.config import Config

    config = Config.load(args.schedule).override(args.overrides)
    from teratron.train.course import course_svg, course_text

    print(course_text(config), end="")
    if args.svg:
        args.svg.write_text(course_svg(config), "utf-8")
        print(f"drawn in {args.svg}")
    return 0


def _layout(args: argparse.Namespace) -> int:
    from teratron.config import Config

    config = Config.load(args.layout).override(args.overrides)  # before the slow import, so that a wrong key is refused at once
    from teratron.plan.layout import lay_out, least_world
    from teratron.plan.layout_svg import layout_svg
    from teratron.plan.layout_text import layout_text
    from teratron.train.engine import check_batch

    layout = lay_out(config, least_world(config.parallel) if args.world is None else args.world, check_batch)
    print(layout_text(layout), end="")
    if config.model.vocab_size == 0:
        print(f"\nonly the data knows the vocabulary; drawn with {layout.config.model.vocab_size:,}: --model.vocab_size sets another")
    if args.svg:
        args.svg.write_text(layout_svg(layout, Path(args.layout).name.removesuffix(".toml")), "utf-8")
        print(f"drawn in {args.svg}")
    return 0
