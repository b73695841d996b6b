"""`teratron bench`: how fast a config trains on this machine, and where the time of its steps goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from teratron.cli.workers import add_nproc, run_workers

SUMMARY = "measure steps of a config on generated tokens: its speed, and where their time goes"
TAKES_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("train", "profile"), help="train: tokens/s, MFU, memory; profile: also each kind of work and its bound"
    )
    parser.add_argument("config", nargs="?", help="a preset's name or a TOML file; default: the defaults below")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are timed; their median counts (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file as well")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="with profile: keep the traces here, for Perfetto")
    add_nproc(parser, "")


def run(args: argparse.Namespace) -> int:
    from teratron.config import Config, UserError

    config = (Config.load(args.config) if args.config else Config()).override(args.overrides)  # before the slow import
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: expected at least 1")
    if args.trace and args.what != "profile":
        raise UserError("--trace keeps what profile traces: say teratron bench profile, or leave --trace out")
    if args.nproc > 1:
        from teratron.train.engine import check_degrees

        check_degrees(config, args.nproc)
    code = run_workers(args)
    if code is not None:
        return code
    from teratron.plan.layout_text import degrees_line, model_line
    from teratron.train.bounds import profile
    from teratron.train.profile_text import profile_json, profile_text, speed_json, speed_text
    from teratron.train.trial import Trial

    trial = Trial(config, args.device)
    if args.what == "profile":
        found = profile(trial, args.steps, args.trace)
        text, numbers = profile_text(found), profile_json(found)
    else:
        speed = trial.speed(args.steps)
        text, numbers = speed_text(speed, trial.mesh.world), speed_json(speed)
    if trial.mesh.rank == 0:
        layout = f"{degrees_line(trial.mesh.sizes)}, {config.train.precision} on {trial.device.type}"
        print(f"{model_line(trial.config.model)}\n{layout}\n\n{text}")
        if args.json:
            args.json.write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    trial.close()
    return 0
