"""Raw text to a prepared data set: tokens in Megatron's PREFIX.bin and .idx, with notes, tokenizer and rejects beside them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from teratron.config import UserError
from teratron.data.cuts import pieces
from teratron.data.indexed import IndexedWriter, smallest_dtype
from teratron.data.output import LongDocument, Output, Rejects
from teratron.data.pool import cores, ordered_map
from teratron.data.readers import Files, Meter, Reading, find_files, read_records
from teratron.data.records import Malformed, Record, Rejection, reject, text_of
from teratron.data.tokenizer import Tokenizer

BATCH = 1 << 20
"""Bytes of text that travel to a worker together."""
FEWEST = 16
"""More bytes of input than this seldom become one token, whatever the format: what does not fit even so is refused at once."""
LARGEST = 1 << 20
"""MiB that a document that cannot be cut may be allowed to have."""
WORTH_A_WORKER = 4 << 20
"""Bytes of input below which another process costs more time than it saves."""


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    documents: int
    bytes_read: int
    """Of the input files as they are on disk, compressed or not."""
    bytes_total: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What a preparation made, and what it left out."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str
    empty: int
    """Documents without a token."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Malformed items by kind."""
    skipped: int = 0
    """Files in folders that are hidden or have no known extension."""
    bytes_read: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"prepared {self.documents:,} documents, {self.tokens:,} tokens ({self.dtype}) in {self.seconds:.1f} s: {self.prefix}"
        if self.rejected:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.rejected.items())
            text += f"; {sum(self.rejected.values()):,} rejected ({kinds}), kept aside in {self.prefix}.rejected.jsonl and .txt"
        text += f"; {self.empty:,} empty" if self.empty else ""
        return text + (f"; {self.skipped:,} files skipped (hidden or unknown extension)" if self.skipped else "")


def prepare(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    workers: int = 0,
    append_eod: bool = True,
    strict: bool = False,
    max_document_mb: float = 64,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
) -> Summary:
    """Tokenize files and folders into the data set PREFIX; the same bytes whatever the number of workers.

    A .jsonl (.gz, .zst) holds a document a line under `text_key`, a .parquet a document a row of that column; any other file
    is one document. Folders are walked in sorted order. workers: processes; 0 = one a core as far as the input is worth it.
    append_eod: end each document with the tokenizer's end-of-document id. strict: the first malformed item is an error;
    else it is counted and kept aside. max_document_mb: largest line, row, or stretch of text that cannot be cut, in MiB.

    Writes PREFIX.bin and .idx (Megatron's format), .json (what made it), .tokenizer/ (a copy) and, when something was
    malformed, .rejected.jsonl (where, why) and .rejected.txt (the bytes). Memory does not grow with the input, but for 12
    bytes a document. Interrupted or failed, it leaves nothing of the new data set and all of a former one.

    Raises `UserError` for missing input, no documents, an existing data set without `overwrite`, and a full disk.
    """
    started = time.monotonic()
    eod = _end_of_document(tokenizer, append_eod)
    if not 0 < max_document_mb <= LARGEST:
        raise UserError(f"--max-document-mb {max_document_mb}: expected more than 0, and at most {LARGEST}")
    files = find_files(inputs)
    reading = Reading(text_key, tokenizer.cut_rule, int(max_document_mb * (1 << 20)))
    workers = workers or max(1, min(cores(), files.total // WORTH_A_WORKER))
    dtype = smallest_dtype(tokenizer.vocab_size)
    with _terminable(), Output(prefix, overwrite) as output:
        output.check_space(files.total * dtype.itemsize // FEWEST)
        meter = Meter()
        encoder = _Encoder(tokenizer, text_key, dtype, eod)
        encoded = ordered_map(encoder, _batches(read_records(files, reading, meter), meter), workers)
        with contextlib.closing(encoded), IndexedWriter(output.scratch / "data", dtype) as writer:
            made = _Made(writer, output.scratch, dtype, eod, strict)
            for batch in encoded:
                made.add(batch)
                if progress is not None:
                    progress(Progress(made.documents, batch.position, files.total, time.monotonic() - started))
            made.refuse_nothing(files)
        tokenizer.save(output.scratch / "data.tokenizer")
        output.commit(_notes(made, files, tokenizer, dtype, text_key, eod))
    counts = dict(made.rejects.counts)
    seconds = time.monotonic() - started
    return Summary(prefix, made.documents, made.tokens, dtype.name, made.empty, counts, files.skipped, files.total, seconds)


def _end_of_document(tokenizer: Tokenizer, append_eod: bool) -> int | None:
    if append_eod and tokenizer.eod is None:
        raise UserError("the tokenizer has no end-of-document token: name one with --eod TOKEN, or add --no-append-eod")
    return tokenizer.eod if append_eod else None


class _Batch(NamedTuple):
    items: list[Record | Rejection]
    position: int
    """Bytes of the input read when it was made."""


class _Encoded(NamedTuple):
    """The tokens of a batch: of all its documents and pieces, one after another."""

    tokens: np.ndarray
    lengths: list[int]
    parts: list[str]
    """Of each document or piece, as `Record.part`."""
    rejections: list[Rejection]
    position: int


def _batches(items: Iterable[Record | Rejection], meter: Meter) -> Iterator[_Batch]:
    held: list[Record | Rejection] = []
    size = 0
    for item in items:
        held.append(item)
        size += len(item.data if isinstance(item, Record) else item.raw)
        if size >= BATCH or len(held) >= BATCH >> 6:
            yield _Batch(held, meter.position)
            held, size = [], 0
    if held:
        yield _Batch(held, meter.position)


@dataclass(frozen=True)
class _Encoder:
    """The work of one process: a batch of records becomes tokens."""

    tokenizer: Tokenizer
    text_key: str
    dtype: np.dtype
    eod: int | None

    def __call__(self, batch: _Batch) -> _Encoded:
        arrays: list[np.ndarray] = []
        parts: list[str] = []
        rejections: list[Rejection] = []
        for item in batch.items:
            if isinstance(item, Rejection):
                rejections.append(item)
                continue
            try:
                text = text_of(item, self.text_key)
            except Malformed as error:
                rejections.append(reject(item, error))
                continue
            arrays.append(self._encode(item, text))
            parts.append(item.part)
        tokens = np.concatenate(arrays) if arrays else np.empty(0, self.dtype)
        return _Encoded(tokens, [len(array) for array in arrays], parts, rejections, batch.position)

    def _encode(self, record: Record, text: str) -> np.ndarray:
        """Token ids of one record; a long one goes through the tokenizer in pieces, which bounds its memory."""
        try:
            arrays = [np.array(self.tokenizer.encode(piece), self.dtype) for piece in pieces(text, self.tokenizer.cut_rule)]
        except UserError as error:
            where = f", line {record.line}" if record.line else ""
            raise UserError(f"{record.file}{where}: {error}") from None
        if self.eod is not None and record.part == "whole" and any(map(len, arrays)):
            arrays.append(np.array([self.eod], self.dtype))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class _Made:
    """The data set so far."""

    def __init__(self, writer: IndexedWriter, scratch: Path, dtype: np.dtype, eod: int | None, strict: bool) -> None:
        self._writer, self._eod, self._strict = writer, eod, strict
        self._long = LongDocument(scratch, dtype)
        self.rejects = Rejects(scratch)
        self.documents = self.tokens = self.empty = 0

    def add(self, batch: _Encoded) -> None:
        """Write a batch's documents. Raises `UserError` at the first malformed item when that is wanted."""
        for rejection in batch.rejections:
            if self._strict:
                raise UserError(f"{rejection} (without --strict it would be counted and kept aside)")
            self.rejects.add(rejection)
        start = 0
        for length, part in zip(batch.lengths, batch.parts, strict=True):
            self._add_part(batch.tokens[start : start + length], part)
            start += length

    def _add_part(self, tokens: np.ndarray, part: str) -> None:
        if part == "whole":
            if len(tokens):
                self._writer.add_document(tokens)
            self._count(len(tokens))
            return
        self._long.add(tokens)
        if part == "end":
            self._count(self._long.finish(self._writer, self._eod))

    def _count(self, tokens: int) -> None:
        self.documents += tokens > 0
        self.empty += tokens == 0
        self.tokens += tokens

    def refuse_nothing(self, files: Files) -> None:
        """Raise `UserError` with the reason when there is not a single document."""
        if self.documents:
            return
        where = ", ".join(str(source["path"]) for source in files.sources[:3])
        if self.rejects.first is not None:
            reason = f"{self.rejects.counts.total():,} rejected, the first: {self.rejects.first}"
        elif self.empty or files.paths:
            reason = f"the {len(files.paths):,} files hold no text"
        else:
            reason = "no file with a known extension; name a file itself to have it read as text"
        raise UserError(f"{where}: no documents: {reason}")


def _notes(made: _Made, files: Files, tokenizer: Tokenizer, dtype: np.dtype, text_key: str, eod: int | None) -> dict[str, Any]:
    """The content of PREFIX.json: without dates, so that the same input gives the same bytes."""
    identity = {name: getattr(tokenizer, name) for name in ("kind", "fingerprint", "vocab_size", "eod", "bos")}
    return {
        "tokenizer": identity,
        "dtype": dtype.name,
        "append_eod": eod is not None,
        "text_key": text_key,
        "documents": made.documents,
        "tokens": made.tokens,
        "empty": made.empty,
        "rejected": dict(made.rejects.counts),
        "skipped": files.skipped,
        "sources": files.sources,
    }


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does, unless the program has its own way with it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
