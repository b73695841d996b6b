"""A data set being written: aside until it is whole, then moved into place, its .idx last; and what was rejected on the way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from teratron.config import UserError
from teratron.data.indexed import IndexedWriter, named
from teratron.data.records import Rejection

PARTS = (".bin", ".json", ".tokenizer", ".rejected.jsonl", ".rejected.txt", ".idx")
"""What a prepared data set is made of, in the order in which it appears."""
ESCAPE = "backslashreplace"
"""How JSON holds a file name that is not UTF-8: Python's escape of a lone surrogate is JSON's own."""
LONGEST_SEQUENCE = 2**31 - 1
"""Tokens; the .idx counts them with 32 bits. A longer document becomes several sequences."""


class Output:
    """The place of a data set PREFIX.*; while it is written, its files lie in the folder PREFIX.partial.

    As a context manager it removes that folder at the end, whatever happens; only `commit` puts anything in place. What a
    killed process left is cleared by the next one. Raises `UserError` for a prefix without a name, when the data set exists and
    `overwrite` is not set, when another process is writing it, and when the folder cannot be written.
    """

    def __init__(self, prefix: Path, overwrite: bool) -> None:
        self.prefix = named(prefix)
        self.scratch = self.part(".partial")
        if not overwrite and (self.part(".idx").exists() or self.part(".bin").exists()):
            raise UserError(f"{prefix}: a data set of this name exists: choose another --output, or add --overwrite")

    def part(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def __enter__(self) -> Output:
        with writing(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.scratch, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(f"{self.prefix}: another process is preparing this data set: wait for it, or choose another --output") from None
        self._clear()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()
        with contextlib.suppress(OSError):
            self.scratch.rmdir()
        os.close(self._lock)

    def _clear(self) -> None:
        for item in self.scratch.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()

    def check_space(self, needed: int) -> None:
        """Refuse to begin what cannot fit on the disk."""
        with writing(self.scratch):
            free = shutil.disk_usage(self.scratch).free
        if free < needed:
            raise UserError(
                f"{self.prefix}: {free / 1e9:.2f} GB are free there, the data set needs at least {needed / 1e9:.2f} GB:"
                " free some space, or choose another --output"
            )

    def commit(self, notes: dict[str, Any]) -> None:
        """Put the data set in place of a former one; at no moment do files of both stand under one .idx."""
        with writing(self.prefix):
            (self.scratch / "data.json").write_text(json.dumps(notes, indent=2, ensure_ascii=False) + "\n", "utf-8", ESCAPE)
            self.part(".idx").unlink(missing_ok=True)
            for suffix in PARTS:
                old, new = self.part(suffix), self.scratch / f"data{suffix}"
                if old.is_dir():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
                if new.exists():
                    new.rename(old)


class LongDocument:
    """A document whose tokens come in pieces: they wait in a file, so that memory does not grow with them."""

    def __init__(self, scratch: Path, dtype: np.dtype) -> None:
        self._path, self._dtype = scratch / "long", dtype
        self._file: BinaryIO | None = None

    def add(self, tokens: np.ndarray) -> None:
        with writing(self._path):
            self._file = self._file or self._path.open("wb")
            self._file.write(tokens.data)

    def finish(self, writer: IndexedWriter, eod: int | None) -> int:
        """Append the document to the data set; returns its tokens, the end of document included, 0 for an empty one."""
        if self._file is None or not self._file.tell():
            return 0
        if eod is not None:
            self.add(np.array([eod], self._dtype))
        with writing(self._path):
            self._file.close()
        self._file = None
        tokens = np.memmap(self._path, self._dtype, "r")
        full, rest = divmod(len(tokens), LONGEST_SEQUENCE)
        writer.add_document(tokens, [LONGEST_SEQUENCE] * full + [rest] * (rest > 0))
        return len(tokens)


class Rejects:
    """What is malformed: a line about each in PREFIX.rejected.jsonl, its bytes verbatim in PREFIX.rejected.txt.

    At most 1 MiB of an item is kept; a line break is added to what does not end with one.
    """

    def __init__(self, scratch: Path) -> None:
        self._notes, self._raw = scratch / "data.rejected.jsonl", scratch / "data.rejected.txt"
        self._position = 0
        self.first: Rejection | None = None
        self.counts: Counter[str] = Counter()

    def add(self, rejection: Rejection) -> None:
        self.first = self.first or rejection
        self.counts[rejection.kind] += 1
        raw = rejection.raw
        note = {
            "file": rejection.file,
            "line": rejection.line or None,
            "offset": rejection.offset,
            "reason": rejection.reason,
            "kept_at": self._position,
            "kept_bytes": len(raw),
        }
        if raw and not raw.endswith(b"\n"):
            raw += b"\n"
        with writing(self._notes), self._notes.open("a", encoding="utf-8", errors=ESCAPE) as notes, self._raw.open("ab") as kept:
            notes.write(json.dumps(note, ensure_ascii=False) + "\n")
            kept.write(raw)
        self._position += len(raw)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a sentence."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, or choose another --output" if full else "choose an --output in a folder that you may write to"
        raise UserError(f"{path}: cannot be written: {error.strerror or error}: {remedy}") from None
