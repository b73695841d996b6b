"""`python bench/data.py`: raw text to tokens in MB/s, and tokens to training samples, beside plain loops; medians, in turn."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from machine import add_line, facts
from rich.console import Console
from rich.table import Table
from start import some_text, wall

from teratron.config import UserError
from teratron.data.bpe import train_bpe
from teratron.data.indexed import IndexedDataset, IndexedWriter
from teratron.data.pool import cores
from teratron.data.samples import NativeSamples
from teratron.data.tokenizer import Tokenizer

VOCABULARY = 8192
DOCUMENT = 4000
"""Characters of a document."""
WIDTH = 1024
"""Tokens of a sample."""
BATCH = 64
"""Samples drawn at once."""
DRAWS = 50
"""Batches of a round."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=16, help="text to prepare (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over them (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    args = parser.parse_args()
    if args.mib < 1 or args.rounds < 1:
        parser.error("expected --mib and --rounds of at least 1")
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), args.mib, args.rounds)
        Console().print(table(found, args.mib))
        if args.json:
            add_line(args.json, {**facts("cpu"), "mib": args.mib, "found": found})
    except UserError as error:
        print(f"bench/data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(folder: Path, mib: int, rounds: int) -> dict[str, float]:
    """MB/s of each way of preparing a `.jsonl` (ours by its command, its start included), million tokens/s of each of drawing samples.

    One more round before the first is dropped.
    """
    text = some_text(2**20)
    tokenizer, source = train_bpe([text], VOCABULARY, ["<|eod|>"]), folder / "text.jsonl"
    write_documents(source, text, mib)
    data = folder / "data"
    tokenizer.save(folder / "tokenizer")
    command = f"-m teratron data prepare {source} --tokenizer {folder / 'tokenizer'} --output {data} --no-append-eod --overwrite --workers"
    ours = [sys.executable, *command.split()]
    preparing: dict[str, Callable[[], object]] = {
        "prepare: a plain loop, a document at a time": partial(plain_loop, source, folder / "plain", tokenizer),
        "prepare: `tokenizers` alone, nothing read or written": partial(encode_alone, source, tokenizer),
        "prepare: teratron, one worker": partial(wall, [*ours, "1"]),
        "prepare: teratron, a worker a core": partial(wall, [*ours, str(cores())]),
    }
    megabytes = source.stat().st_size / 1e6
    found = {name: megabytes / seconds for name, seconds in timed(preparing, rounds).items()}
    dataset = IndexedDataset(data)
    samples = NativeSamples(dataset, 0, dataset.total_tokens, WIDTH, 1)
    drawing: dict[str, Callable[[], object]] = {
        "samples: a plain loop, random windows of a memory map": partial(random_windows, dataset.tokens),
        "samples: teratron, each token once an epoch": partial(all_in_turn, samples),
    }
    drawn = DRAWS * BATCH * WIDTH / 1e6
    return found | {name: drawn / seconds for name, seconds in timed(drawing, rounds).items()}


def timed(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            begun = time.perf_counter()
            case()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: median(found) for name, found in seconds.items()}


def write_documents(path: Path, text: str, mib: int) -> None:
    """`mib` MiB of documents, a line each; the text over and over."""
    documents = [text[start : start + DOCUMENT] for start in range(0, len(text), DOCUMENT)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(mib):
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents)


def plain_loop(source: Path, prefix: Path, tokenizer: Tokenizer) -> None:
    """What a script for it does: read a line, encode its text, write the tokens."""
    with source.open(encoding="utf-8") as file, IndexedWriter(prefix, np.uint16) as writer:
        for line in file:
            writer.add_document(np.array(tokenizer.encode(json.loads(line)["text"]), dtype=np.uint16))


def encode_alone(source: Path, tokenizer: Tokenizer) -> None:
    """A batch of 256 documents at a time, on all cores by the library's own threads."""
    with source.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    for start in range(0, len(texts), 256):
        tokenizer.encode_batch(texts[start : start + 256])


def random_windows(tokens: np.ndarray) -> None:
    """As in nanoGPT's `get_batch`: with replacement."""
    random = np.random.default_rng(1)
    for _ in range(DRAWS):
        starts = random.integers(len(tokens) - WIDTH, size=BATCH)
        np.stack([tokens[start : start + WIDTH + 1].astype(np.int64) for start in starts])


def all_in_turn(samples: NativeSamples) -> None:
    for number in range(DRAWS):
        samples.rows(np.arange(number * BATCH, (number + 1) * BATCH))


def table(found: dict[str, float], mib: int) -> Table:
    grid = Table(title=f"{mib} MiB of documents, byte-level BPE of {VOCABULARY:,}; samples of {WIDTH:,} tokens")
    grid.add_column("case")
    grid.add_column("MB/s, million tokens/s", justify="right")
    for name, rate in found.items():
        grid.add_row(name, f"{rate:,.1f}")
    return grid


if __name__ == "__main__":
    sys.exit(main())
