"""Files to evaluate on: tables of examples, and plain text, also compressed by gzip or bzip2."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

from teratron.config import UserError, nearest
from teratron.tasks.finetune.rows import READERS, Row, read_table


def is_table(file: Path) -> bool:
    """Whether a file's name says that it holds rows with named columns."""
    return file.name.removesuffix(".gz").rpartition(".")[2].lower() in READERS


def read_rows(file: Path) -> list[Row]:
    """The rows of a table. Raises `UserError` as `read_table` does."""
    return read_table([file]).rows


def read_text(file: Path) -> str:
    """All of a file's text. Raises `UserError` for one that is missing, unreadable or no UTF-8."""
    if not file.is_file():
        known = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"--data {file}: no such file{nearest(file.name, known)}")
    unpack: dict[str, Callable[[bytes], bytes]] = {".bz2": bz2.decompress, ".gz": gzip.decompress}
    try:
        return unpack.get(file.suffix, bytes)(file.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"--data {file}: cannot be read as UTF-8 text ({error}); convert it, or give another file") from None


def texts_under(rows: list[Row], key: str, file: Path) -> list[str]:
    """Each row's text in a column. Raises `UserError` that tells what there is instead."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(key), str):
            found = (
                f"its '{key}' is a {type(row[key]).__name__}" if key in row else f"found the columns {', '.join(map(str, row)) or '(none)'}"
            )
            raise UserError(f"--data {file}, example {number}: {found}, expected a text in a column '{key}'")
    return [row[key] for row in rows]
