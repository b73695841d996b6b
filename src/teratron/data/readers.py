"""Files and folders to records, in order, holding no more in memory than one document or piece."""

from __future__ import annotations

import codecs
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from teratron.config import UserError, nearest
from teratron.data.cuts import CutRule, NoCut, cut_stream, pieces
from teratron.data.records import KEPT, Malformed, Record, Rejection, refuse_binary, refuse_compressed, reject, text_of

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_SUFFIXES = (
    *(".txt", ".md", ".rst", ".tex"),
    *(".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".java", ".js", ".mjs", ".jsx", ".ts"),
    *(".tsx", ".go", ".rs", ".rb", ".php", ".swift", ".kt", ".scala", ".cs", ".sh", ".bash", ".pl", ".pm", ".lua", ".r", ".jl", ".sql"),
    *(".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".lisp", ".el", ".f", ".f90", ".asm", ".s", ".v", ".proto", ".css"),
)
"""What is taken from a folder beside .jsonl and .parquet; a file named explicitly is taken whatever its name."""
REJECTED = (".rejected.jsonl", ".rejected.txt")
"""What preparation itself kept aside; never taken from a folder, where it may lie beside a former data set."""
SMALL = 4 << 20
"""Bytes up to which a text file is one record; larger ones are cut."""


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_key: str = "text"
    """Key of a .jsonl object, column of a .parquet."""
    rule: CutRule = "word"
    """Where a long text file may be cut."""
    limit: int = 64 << 20
    """Largest document that cannot be cut, in bytes."""


@dataclass
class Meter:
    """How many bytes of the files on disk have been read."""

    done: int = 0
    within: Callable[[], int] = field(default=lambda: 0)
    """Position in the file being read."""

    @property
    def position(self) -> int:
        return self.done + self.within()

    def finish(self, size: int) -> None:
        self.done, self.within = self.done + size, lambda: 0


@dataclass
class Files:
    """What the inputs hold: the files to read in order with their sizes in bytes, and how many others lie between them."""

    paths: list[Path] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    skipped: int = 0
    sources: list[dict[str, str | int]] = field(default_factory=list)
    """One of each input: its path as given, its files, their bytes."""

    @property
    def total(self) -> int:
        return sum(self.sizes)


def find_files(inputs: Sequence[Path]) -> Files:
    """The files that inputs name. Folders are walked in sorted order; what is hidden or has an unknown extension is skipped.

    Raises `UserError` for an input that is missing or unreadable, and for a package that reading needs and that is not installed.
    """
    if not inputs:
        raise UserError("no input: name at least one file or folder")
    files = Files()
    for item in inputs:
        if not item.exists():
            if item.is_symlink():
                raise UserError(f"{item}: a link that leads nowhere: mend it, or name the file itself")
            known = [str(other) for other in item.parent.iterdir()] if item.parent.is_dir() else []
            raise UserError(f"{item}: no such file or folder{nearest(str(item), known)}")
        if not item.is_dir() and not item.is_file():
            raise UserError(f"{item}: neither a file nor a folder: write its content to a file first")
        before = len(files.paths)
        for path in _walk(item, files) if item.is_dir() else [item]:
            if not os.access(path, os.R_OK):
                raise UserError(f"{path}: not readable: check its permissions")
            files.paths.append(path)
            files.sizes.append(path.stat().st_size)
        files.sources.append({"path": str(item), "files": len(files.paths) - before, "bytes": sum(files.sizes[before:])})
    _require(files.paths, ".parquet", "pyarrow")
    _require(files.paths, ".jsonl.zst", "zstandard")
    return files


def _walk(folder: Path, files: Files) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        files.skipped += sum(name.startswith(".") for name in [*folders, *names])
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(place, name)
            if _is_known(name.lower()) and path.is_file():
                yield path
            else:
                files.skipped += 1


def _is_known(name: str) -> bool:
    return name.endswith((*LINE_SUFFIXES, ".parquet", *TEXT_SUFFIXES)) and not name.endswith(REJECTED)


def _require(paths: list[Path], suffix: str, package: str) -> None:
    first = next((path for path in paths if path.name.lower().endswith(suffix)), None)
    if first is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"{first}: reading it needs the {package} package: pip install {package}")


def read_records(files: Files, reading: Reading, meter: Meter) -> Iterator[Record | Rejection]:
    """Every document of the files, in order, and what is malformed where it is met. Raises `UserError` when a file cannot be read."""
    from teratron.data.formats import read_lines, read_parquet

    for path, size in zip(files.paths, files.sizes, strict=True):
        name = path.name.lower()
        read = read_lines if name.endswith(LINE_SUFFIXES) else read_parquet if name.endswith(".parquet") else read_text
        try:
            yield from read(path, reading, meter)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        meter.finish(size)


def read_texts(
    inputs: Sequence[Path], text_key: str = "text", on_rejection: Callable[[Rejection], None] | None = None, meter: Meter | None = None
) -> Iterator[str]:
    """The texts of files and folders, long ones in pieces, for training a tokenizer; what is malformed goes to `on_rejection`."""
    reading = Reading(text_key)
    for item in read_records(find_files(inputs), reading, meter or Meter()):
        rejection = item if isinstance(item, Rejection) else None
        if isinstance(item, Record):
            try:
                yield from pieces(text_of(item, text_key), reading.rule)
            except Malformed as error:
                rejection = reject(item, error)
        if rejection is not None and on_rejection is not None:
            on_rejection(rejection)


def read_text(path: Path, reading: Reading, meter: Meter) -> Iterator[Record | Rejection]:
    """A text file: one document, in pieces when it is large.

    A large file is read twice: nothing of a document may be written before all of it is known to be good.
    """
    name = str(path)
    size = path.stat().st_size
    if size <= min(SMALL, reading.limit):
        meter.within = lambda: size
        yield Record(name, 0, 0, path.read_bytes(), "file")
        return
    try:
        for _ in _text_pieces(path, reading, Meter()):
            pass
    except Malformed as error:
        with path.open("rb") as file:
            yield Rejection(name, 0, error.offset, error.reason, file.read(KEPT))
        return
    held: str | None = None
    try:
        for piece in _text_pieces(path, reading, meter):
            if held is not None:
                yield Record(name, 0, 0, held, "text", "more")
            held = piece
    except Malformed:
        raise UserError(f"{path}: changed while it was read: prepare it again when nobody writes to it") from None
    yield Record(name, 0, 0, held or "", "text", "end")


def _text_pieces(path: Path, reading: Reading, meter: Meter) -> Iterator[str]:
    try:
        yield from cut_stream(_text_blocks(path, meter), reading.rule, limit=reading.limit)
    except NoCut as error:
        raise Malformed(f"too long: {error.args[0]:,} characters without a place where this tokenizer's text may be cut") from None


def _text_blocks(path: Path, meter: Meter) -> Iterator[str]:
    """A text file's blocks of about 1 MB. Raises `Malformed`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb", buffering=0) as file:
        meter.within = lambda: offset
        while block := file.read(1 << 20):
            if offset == 0:
                refuse_compressed(block)
            refuse_binary(block, offset)
            text = _decode_block(decoder, block, offset)
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(block)
    yield _decode_block(decoder, b"", offset)


def _decode_block(decoder: codecs.IncrementalDecoder, block: bytes, offset: int) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise Malformed(f"not UTF-8: byte 0x{found:02x}; convert the file to UTF-8", offset - pending + error.start) from None
