"""`teratron convert`: weights from wherever they are, written for wherever they are to be used."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from teratron.cli.parser import given
from teratron.config import UserError

if TYPE_CHECKING:
    from teratron.checkpoint import Weights

SUMMARY = "write a model's weights into one safetensors file, or for another system"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TARGETS = ("weights", "huggingface", "megatron", "llama2c", "peft", "run")
SCRIPT = "args"
"""The source that is no weights: a launch script follows it."""
_WHOLE = ("weights", "huggingface", "megatron", "llama2c")
_USES = {
    "--to": TARGETS,
    "--adapter": _WHOLE,
    "--dtype": ("weights", "huggingface", "megatron", "peft"),
    "--upcycle": _WHOLE,
    "--experts-per-token": _WHOLE,
    "--format": ("megatron",),
    "--tensor": ("megatron",),
    "--pipeline": ("megatron",),
    "--shard-size": ("huggingface",),
    "--output": (SCRIPT,),
    "--overwrite": (*_WHOLE, "peft", SCRIPT),
}
"""What each option has an effect on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    usual = f"%(prog)s SOURCE OUTPUT [--to {'|'.join(TARGETS)}] [options]"
    parser.usage = f"{usual}\n       %(prog)s {SCRIPT} SCRIPT [--output FILE] [--overwrite]"
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run (its newest good checkpoint), a checkpoint, a converted file, a Hugging Face or Megatron-LM folder, a llama2.c file",
    )
    text = "what to write, such as OUT.safetensors; behind the word `args` a launch script of Megatron-LM, whose config is printed"
    parser.add_argument("output", type=Path, nargs="?", metavar="OUTPUT", help=text)
    parser.add_argument(
        "--to", choices=TARGETS, help="what to write (default: weights for a name that ends with .safetensors, llama2c for .bin)"
    )
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapters in PEFT's format, to be merged into the weights")
    parser.add_argument("--dtype", choices=DTYPES, help="numbers in the file (default: as they are stored)")
    parser.add_argument("--upcycle", type=int, metavar="EXPERTS", help="make every feed-forward layer a mixture of so many copies")
    parser.add_argument("--experts-per-token", type=int, default=2, metavar="K", help="with --upcycle: experts of a token (default: 2)")
    megatron = parser.add_argument_group("with --to megatron")
    megatron.add_argument(
        "--format", choices=("torch_dist", "legacy"), default="torch_dist", help="legacy = mp_rank_* (default: torch_dist)"
    )
    megatron.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor ranks that will read it (default: 1)")
    megatron.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline ranks, with --format legacy (default: 1)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="with --to huggingface: of one file at most (default: 5GB)")
    text = "with `args SCRIPT`: the config's file (default: it is printed)"
    parser.add_argument("--output", dest="config", type=Path, metavar="FILE", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace what has this name; not with --to run")


def run(args: argparse.Namespace) -> int:
    target = _target(args)
    _check_use(target, given(args))
    if target == SCRIPT:
        from teratron.cli.convert_arguments import print_config

        return print_config(args.output, args.config, args.overwrite)
    import torch

    from teratron.checkpoint import open_weights, upcycle
    from teratron.checkpoint.adapters import merged
    from teratron.checkpoint.peft import with_adapter

    weights = open_weights(args.source)
    if target != "peft":
        weights = merged(weights)
    if args.adapter:
        weights = with_adapter(weights, args.adapter)
    if args.upcycle is not None:
        weights = upcycle(weights, args.upcycle, args.experts_per_token)
    weights = weights.cast(getattr(torch, DTYPES[args.dtype]) if args.dtype else None)
    print(f"wrote {args.output}: the weights of {weights.name}{WRITERS[target](weights, args)}")
    return 0


def _target(args: argparse.Namespace) -> str:
    """What to write, from the output's name where it was not said."""
    if str(args.source) == SCRIPT:
        if args.output is None:
            raise UserError("teratron convert args: the launch script is missing, such as `teratron convert args train.sh`")
        return SCRIPT
    if args.output is None:
        raise UserError(f"teratron convert {args.source}: OUTPUT is missing, such as `teratron convert {args.source} OUT.safetensors`")
    usual = {".safetensors": "weights", ".bin": "llama2c"}
    if not args.to and args.output.suffix not in usual:
        raise UserError(f"{args.output}: add --to {'|'.join(TARGETS)}, or give a name that ends with .safetensors")
    return str(args.to or usual[args.output.suffix])


def _check_use(target: str, options: set[str]) -> None:
    """Refuse options that would change nothing."""
    for option, targets in _USES.items():
        if option in options and target not in targets:
            here = "`args SCRIPT`" if target == SCRIPT else f"--to {target}"
            there = "`args SCRIPT`" if targets == (SCRIPT,) else f"--to {'|'.join(one for one in targets if one != SCRIPT)}"
            raise UserError(f"{option}: has no effect with {here}, only with {there}: leave it out")
    if "--experts-per-token" in options and "--upcycle" not in options:
        raise UserError("--experts-per-token: has no effect without --upcycle: add --upcycle EXPERTS, or leave it out")
    if target == SCRIPT and "--overwrite" in options and "--output" not in options:
        raise UserError("--overwrite: the config is printed, nothing is replaced: add --output FILE, or leave it out")


def _weights(weights: Weights, args: argparse.Namespace) -> str:
    from teratron.checkpoint import write_weights
    from teratron.checkpoint.describe import size_text

    compared = write_weights(weights, args.output, args.overwrite)
    return f", {size_text(args.output.stat().st_size)}; {compared}"


def _huggingface(weights: Weights, args: argparse.Namespace) -> str:
    from teratron.checkpoint.huggingface import write_huggingface

    return f"; {write_huggingface(weights, args.output, _bytes(args.shard_size), args.overwrite)}"


def _megatron(weights: Weights, args: argparse.Namespace) -> str:
    from teratron.checkpoint.megatron.write import Layout, write_megatron

    compared = write_megatron(weights, args.output, Layout(args.tensor, args.pipeline), args.format, args.overwrite)
    return f"; {compared}; Megatron-LM reads it with --load {args.output}"


def _run(weights: Weights, args: argparse.Namespace) -> str:
    from teratron.checkpoint.megatron.resume import write_run
    from teratron.train.run import absolute_paths

    return f" with its optimizer's state, as {write_run(args.source, args.output, absolute_paths)}"


def _llama2c(weights: Weights, args: argparse.Namespace) -> str:
    from teratron.checkpoint.llama2c import write_llama2c

    return f"; {write_llama2c(weights, args.output, args.overwrite)}"


def _peft(weights: Weights, args: argparse.Namespace) -> str:
    from teratron.checkpoint.peft import write_peft

    return f"; {write_peft(weights, args.output, args.overwrite)}"


def _bytes(size: str) -> int:
    """Bytes of a text such as 5GB or 200MB."""
    found = re.fullmatch(r"(\d+)([KMG])B", size, re.IGNORECASE)
    if found is None or not int(found[1]):
        raise UserError(f"--shard-size {size}: expected a number and KB, MB or GB, such as 5GB")
    return int(found[1]) * 1000 ** ("KMG".index(found[2].upper()) + 1)


WRITERS: dict[str, Callable[[Weights, argparse.Namespace], str]] = {
    "weights": _weights,
    "huggingface": _huggingface,
    "megatron": _megatron,
    "llama2c": _llama2c,
    "peft": _peft,
    "run": _run,
}
"""Each writes, and tells what there is to know."""
