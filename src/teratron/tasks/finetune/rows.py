"""What is fine-tuned on: rows from JSONL, JSON, CSV, TSV, CoNLL, SQuAD JSON or parallel text, their columns found or named."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teratron.config import UserError, nearest

Row = dict[str, Any]
"""One example: what stands in each of its columns."""


@dataclass
class Table:
    """The rows of some files, and what was noticed while they were read."""

    name: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def read_table(paths: Sequence[Path], parallel: bool = False) -> Table:
    """Read files, by the ending of their names, one after the other.

    parallel: two text files are the two sides of one table, line by line (`source`, `target`). Raises `UserError` for a file that is
    absent, empty, of an unknown kind or damaged, naming the line.
    """
    for path in paths:
        if not path.is_file():
            near = nearest(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise UserError(f"--data {path}: no such file{near}")
    name = " ".join(map(str, paths))
    if parallel and len(paths) % 2 == 0 and all(_kind(path) not in READERS for path in paths):
        rows = _parallel(paths)
    else:
        rows = [row for path in paths for row in _reader(path)(path)]
    if not rows:
        raise UserError(f"--data {name}: holds no example; give another file")
    return Table(name, rows)


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def _reader(path: Path) -> Callable[[Path], Iterable[Row]]:
    if _kind(path) not in READERS:
        raise UserError(f"--data {path}: unknown kind of file: expected a name that ends with .{', .'.join(READERS)}")
    return READERS[_kind(path)]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines by number, from 1, without their ends."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: cannot be read as UTF-8 text ({error}); convert it, or give another file") from None


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--data {path}, line {number}: no JSON ({error}): correct it, or leave the line out") from None
        if not isinstance(row, dict):
            raise UserError(f"--data {path}, line {number}: found a JSON {type(row).__name__}, expected an object with named columns")
        yield row


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or one with `data`: SQuAD's articles."""
    try:
        content = json.loads("\n".join(line for _, line in _lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--data {path}: no JSON ({error}): correct it, or give another file") from None
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--data {path}: expected a list of objects, or an object whose 'data' is one (as SQuAD has)")
    for row in rows:
        yield from _squad(row, path) if "paragraphs" in row else [row]


def _squad(article: Row, path: Path) -> Iterator[Row]:
    try:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield {
                    "id": asked.get("id", ""),
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": [(found["text"], int(found["answer_start"])) for found in asked.get("answers", ())],
                }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--data {path}: an article is not as SQuAD has it ({error!r}): expected paragraphs, qas, answers") from None


class _Unquoted(csv.excel_tab):
    """Tab-separated text in which a quotation mark is one."""

    quoting = csv.QUOTE_NONE


def _separated(separator: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        lines = (f"{line}\n" for _, line in _lines(path))
        dialect = csv.excel if separator == "," else _Unquoted
        reader = csv.DictReader(lines, dialect=dialect, restkey="", strict=True)
        try:
            for row in reader:
                if None in row.values() or "" in row:
                    found = sum(value is not None for value in row.values()) if "" not in row else len(reader.fieldnames or ()) + 1
                    raise csv.Error(f"{found} columns, the first line names {len(reader.fieldnames or ())}")
                yield row
        except csv.Error as error:
            raise UserError(f"--data {path}, line {reader.line_num}: {error}: correct it, or leave the line out") from None

    return read


def _conll(path: Path) -> Iterator[Row]:
    """Words and tags in the first and the last column, sentences between empty lines."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in [*_lines(path), (0, "")]:
        columns = re.split(r"\t| +", line.strip()) if line.strip() else []
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise UserError(f"--data {path}, line {number}: found {line!r}, expected a word and its tag")
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield {"words": words, "tags": tags}
            words, tags = [], []


def _parallel(paths: Sequence[Path]) -> list[Row]:
    """The first half of the files is the source, the second the target."""
    sides = [[line for path in half for _, line in _lines(path)] for half in (paths[: len(paths) // 2], paths[len(paths) // 2 :])]
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"--data: {len(sides[0]):,} lines in the first half of the files ({paths[0]} ...), {len(sides[1]):,} in the second: "
            "parallel text has as many; give sources first, then targets in the same order"
        )
    return [{"source": source, "target": target} for source, target in zip(*sides, strict=True)]


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "conll": _conll,
    "annotated": _conll,
    "bio": _conll,
}


def find_columns(table: Table, usual: Mapping[str, Sequence[str]], named: Mapping[str, str], optional: Sequence[str] = ()) -> Table:
    """The same rows with the task's own names of columns: as `named` says (role -> column), else the first usual name that is there.

    Raises `UserError` that names the columns found where one is missing, and the row in which one is empty.
    """
    there = list(dict.fromkeys(name for row in table.rows[:100] for name in row))
    unknown = next((role for role in named if role not in usual), None)
    if unknown is not None:
        raise UserError(f"--columns {unknown}={named[unknown]}: this task has no such column{nearest(unknown, usual)}: {', '.join(usual)}")
    chosen: dict[str, str] = {}
    for role, names in usual.items():
        column = named.get(role) or next((name for name in names if name in there), None)
        if column is not None and column in there:
            chosen[role] = column
        elif role in named or role not in optional:
            tried = f"'{named[role]}'" if role in named else " or ".join(f"'{name}'" for name in names)
            raise UserError(f"--data {table.name}: no column {tried}; found {', '.join(there)}: name it with --columns {role}=COLUMN")
    rows = [{role: row.get(column) for role, column in chosen.items()} for row in table.rows]
    for number, row in enumerate(rows, 1):
        empty = next((role for role, value in row.items() if value is None and role not in optional), None)
        if empty is not None:
            raise UserError(f"--data {table.name}, example {number}: its {chosen[empty]!r} is missing: fill it, or leave the example out")
    return Table(table.name, rows, [*table.notes, "columns " + ", ".join(f"{role}={name}" for role, name in chosen.items())])
