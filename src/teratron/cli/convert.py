"""`teratron convert`: weights from wherever they are, written for wherever they are to be used."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write a model's weights into one safetensors file, or for another system"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TARGETS = ("weights", "megatron")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run (its newest good checkpoint), a checkpoint, a converted file, a Hugging Face folder",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="what to write, such as OUT.safetensors")
    parser.add_argument("--to", choices=TARGETS, help="what to write (default: weights, for a name that ends with .safetensors)")
    parser.add_argument("--dtype", choices=DTYPES, help="numbers in the file (default: as they are stored)")
    parser.add_argument(
        "--upcycle", type=int, default=0, metavar="EXPERTS", help="make every feed-forward layer a mixture of so many copies"
    )
    parser.add_argument("--experts-per-token", type=int, default=2, metavar="K", help="with --upcycle: experts of a token (default: 2)")
    megatron = parser.add_argument_group("with --to megatron")
    megatron.add_argument(
        "--format", choices=("torch_dist", "legacy"), default="torch_dist", help="legacy = mp_rank_* (default: torch_dist)"
    )
    megatron.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor ranks that will read it (default: 1)")
    megatron.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline ranks, with --format legacy (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace what has this name")


def run(args: argparse.Namespace) -> int:
    import torch

    from teratron.checkpoint import open_weights, upcycle, write_weights
    from teratron.checkpoint.describe import size_text

    weights = open_weights(args.source)
    if args.upcycle:
        weights = upcycle(weights, args.upcycle, args.experts_per_token)
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    if args.to == "megatron":
        from teratron.checkpoint.megatron.write import Layout, write_megatron

        folder = write_megatron(weights.cast(dtype), args.output, Layout(args.tensor, args.pipeline), args.format, args.overwrite)
        print(f"wrote {folder}: the weights of {weights.name}; Megatron-LM reads it with --load {args.output}")
        return 0
    size = write_weights(weights, args.output, dtype, args.overwrite)
    print(f"wrote {args.output}: the weights of {weights.name}, {size_text(size)}")
    return 0
