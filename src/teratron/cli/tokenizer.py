"""`teratron tokenizer`: train one, or look at one."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from teratron.cli.parser import text

SUMMARY = "train a byte-level BPE or WordPiece tokenizer on text, or show how one cuts a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", required=True, metavar="train|show")
    train = verbs.add_parser("train", help="learn a byte-level BPE or a WordPiece from files and folders", allow_abbrev=False)
    train.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders: text, source code, .jsonl[.gz|.zst], .parquet"
    )
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens: 257 or more, for WordPiece 1005 or more")
    train.add_argument("--kind", choices=("bpe", "wordpiece"), default="bpe", help="how words are cut into pieces (default: bpe)")
    train.add_argument("--cased", action="store_true", help="WordPiece: keep capitals and accents")
    train.add_argument(
        "--special",
        action="append",
        type=text,
        default=[],
        metavar="TOKEN",
        help="reserve a token that no text has, such as [MASK]; may be repeated",
    )
    train.add_argument("--output", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    train.add_argument(
        "--text-key", type=text, default="text", metavar="K", help="key of a .jsonl object or column of a .parquet (default: text)"
    )
    show = verbs.add_parser("show", help="say what a tokenizer is, and how it cuts a text", allow_abbrev=False)
    show.add_argument("tokenizer", metavar="T", help="`bytes`, a tokenizer file, or a folder that holds one")
    show.add_argument("text", nargs="?", type=text, metavar="TEXT", help="text to cut into tokens")


def run(args: argparse.Namespace) -> int:
    return _train(args) if args.action == "train" else _show(args)


def _train(args: argparse.Namespace) -> int:
    import shutil
    import time

    from teratron.config import UserError
    from teratron.data.bpe import train_bpe
    from teratron.data.output import writing
    from teratron.data.readers import read_texts
    from teratron.data.records import Rejection
    from teratron.data.wordpiece import train_wordpiece

    output: Path = args.output
    if output.suffix != ".json":
        raise UserError(f"--output {output}: expected a name that ends with .json, such as {output.name or 'tokenizer'}.json")
    if args.cased and args.kind == "bpe":
        raise UserError("--cased concerns --kind wordpiece: a byte-level BPE always keeps capitals and accents; leave it out")
    learn = train_bpe if args.kind == "bpe" else functools.partial(train_wordpiece, cased=args.cased)
    started = time.monotonic()
    rejected: list[Rejection] = []
    try:
        tokenizer = learn(read_texts(args.inputs, args.text_key, rejected.append), args.vocab_size, args.special)
    except UserError as error:
        reason = f"; {len(rejected):,} malformed items were left out, the first: {rejected[0]}" if rejected else ""
        raise UserError(f"{error}{reason}") from None
    with writing(output):
        folder = output.with_name(f".{output.name}.partial")
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            tokenizer.save(folder)
            (folder / "tokenizer.json").replace(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"trained {tokenizer.vocab_size:,} tokens in {time.monotonic() - started:.1f} s: {output}")
    if tokenizer.vocab_size < args.vocab_size:
        print(f"  fewer than the {args.vocab_size:,} asked for: the text has no more pairs that occur twice")
    if rejected:
        print(f"  {len(rejected):,} malformed items left out, the first: {rejected[0]}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from teratron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    for name in ("kind", "vocab_size", "eod", "bos", "fingerprint"):
        value = getattr(tokenizer, name)
        spelled = f"  {tokenizer.decode([value])!r}" if name in ("eod", "bos") and value is not None else ""
        print(f"{name:12} {value if value is not None else '-'}{spelled}")
    if args.text is not None:
        ids = tokenizer.encode(args.text)
        print(f"{'tokens':12} {len(ids)}")
        print(" ".join(f"{token}:{tokenizer.decode([token])!r}" for token in ids))
    return 0
