"""`teratron data`: prepare raw text, and inspect what was prepared."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teratron.cli.parser import text

if TYPE_CHECKING:
    from teratron.data.prepare import Progress

SUMMARY = "prepare text for training (Megatron's .bin/.idx), or inspect a prepared data set"
SHOWN = 64
"""Tokens that `inspect` decodes."""
LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", required=True, metavar="prepare|inspect")
    prepare = verbs.add_parser("prepare", help="tokenize files and folders", allow_abbrev=False)
    prepare.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders: text, source code, .jsonl[.gz|.zst], .parquet"
    )
    prepare.add_argument("--tokenizer", required=True, metavar="T", help="`bytes`, a tokenizer file, or a folder that holds one")
    prepare.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and what belongs to them"
    )
    prepare.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 = one a core (default: 0)")
    prepare.add_argument(
        "--text-key", type=text, default="text", metavar="K", help="key of a .jsonl object or column of a .parquet (default: text)"
    )
    prepare.add_argument("--eod", type=text, default="", metavar="TOKEN", help="end-of-document token (default: the tokenizer's own)")
    prepare.add_argument("--no-append-eod", action="store_true", help="do not end documents with the end-of-document token")
    prepare.add_argument("--strict", action="store_true", help="stop at the first malformed item instead of keeping it aside")
    prepare.add_argument(
        "--max-document-mb",
        type=float,
        default=64,
        metavar="N",
        help="largest line, row or uncuttable stretch of text, in MiB (default: 64)",
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace a data set of this name")
    inspect = verbs.add_parser("inspect", help="say what a prepared data set holds", allow_abbrev=False)
    inspect.add_argument("prefix", type=Path, metavar="PREFIX", help="the PREFIX of PREFIX.bin and PREFIX.idx")


def run(args: argparse.Namespace) -> int:
    return _prepare(args) if args.action == "prepare" else _inspect(args)


def _prepare(args: argparse.Namespace) -> int:
    from teratron.config import UserError
    from teratron.data.prepare import prepare
    from teratron.data.tokenizer import load_tokenizer

    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 (one a core) or more")
    tokenizer = load_tokenizer(args.tokenizer, args.eod)
    with _shown_progress() as progress:
        summary = prepare(
            args.inputs,
            args.output,
            tokenizer,
            text_key=args.text_key,
            workers=args.workers,
            append_eod=not args.no_append_eod,
            strict=args.strict,
            max_document_mb=args.max_document_mb,
            progress=progress,
            overwrite=args.overwrite,
        )
    print(summary)
    return 0


@contextlib.contextmanager
def _shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A live bar on a terminal, else a line every ten seconds; on standard error."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = [TextColumn("{task.percentage:3.0f} %"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()]
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda at: bar.update(task, completed=at.bytes_read, total=at.bytes_total, description=_rates(at))


def _lines() -> Callable[[Progress], None]:
    last = time.monotonic()

    def show(at: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < LINE_EVERY:
            return
        last = time.monotonic()
        left = at.seconds * (at.bytes_total / max(at.bytes_read, 1) - 1)
        print(f"{at.bytes_read / max(at.bytes_total, 1):4.0%}  {_rates(at)}  {left:.0f} s left", file=sys.stderr, flush=True)

    return show


def _rates(at: Progress) -> str:
    seconds = max(at.seconds, 1e-9)
    return f"{at.documents:,} documents  {at.documents / seconds:,.0f}/s  {at.bytes_read / 1e6 / seconds:.1f} MB/s"


def _inspect(args: argparse.Namespace) -> int:
    from teratron.data.indexed import IndexedDataset
    from teratron.data.tokenizer import load_tokenizer

    dataset = IndexedDataset(args.prefix)
    lengths = dataset.lengths
    print(f"documents    {dataset.document_count:,} ({len(lengths):,} sequences)")
    print(f"tokens       {dataset.total_tokens:,} ({dataset.dtype.name}, {dataset.total_tokens * dataset.dtype.itemsize:,} bytes)")
    print(f"sequence     {lengths.min():,} to {lengths.max():,} tokens, {lengths.mean():,.1f} on average")
    first = dataset.tokens[:SHOWN].tolist()
    print(f"first ids    {' '.join(map(str, first[:16]))}")
    folder = dataset.prefix.with_name(f"{dataset.prefix.name}.tokenizer")
    if not folder.is_dir():
        print(f"largest id   {dataset.max_token():,}")
        print("tokenizer    unknown: no copy beside the data set")
        return 0
    tokenizer = load_tokenizer(folder)
    print(f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, end of document {tokenizer.eod}, {tokenizer.fingerprint[:16]}")
    print(f"begins       {tokenizer.decode(first)!r}")
    return 0
