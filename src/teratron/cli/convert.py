"""`teratron convert`: a checkpoint's weights as one safetensors file."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

SUMMARY = "write a checkpoint's weights into one safetensors file"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="CHECKPOINT", help="a checkpoint folder, or a run folder (its newest good one)")
    parser.add_argument("output", type=Path, metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="numbers in the file (default: as they are stored)")
    parser.add_argument(
        "--upcycle", type=int, default=0, metavar="EXPERTS", help="make every feed-forward layer a mixture of so many copies"
    )
    parser.add_argument("--experts-per-token", type=int, default=2, metavar="K", help="with --upcycle: experts of a token (default: 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of this name")


def run(args: argparse.Namespace) -> int:
    import torch

    from teratron.checkpoint import find_checkpoint, upcycle, write_weights
    from teratron.checkpoint.describe import size_text

    checkpoint = find_checkpoint(args.source)
    dtype, experts = getattr(torch, DTYPES[args.dtype]) if args.dtype else None, args.upcycle
    change = partial(upcycle, experts=experts, experts_per_token=args.experts_per_token) if experts else None
    size = write_weights(checkpoint, args.output, dtype, args.overwrite, change)
    print(f"wrote {args.output}: the weights of {checkpoint.folder}, {size_text(size)}")
    return 0
