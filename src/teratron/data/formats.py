"""Files of many documents: .jsonl, plain or compressed with gzip or zstd, and .parquet."""

from __future__ import annotations

import functools
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from teratron.data.readers import Meter, Reading
from teratron.data.records import KEPT, Record, Rejection

if TYPE_CHECKING:
    import pyarrow.parquet as parquet

ROWS = 64
"""Rows of a .parquet that are taken at once."""


class _Damaged(Exception):
    """A compressed stream that cannot be read on."""


def read_lines(path: Path, reading: Reading, meter: Meter) -> Iterator[Record | Rejection]:
    """A record for each line of a .jsonl, whose content is looked at later; a blank line is an empty document.

    Rejects lines beyond the limit, without ever holding one whole, and the rest of a damaged compressed file: what was read
    before the damage showed stays, which for a wrong checksum is at the end of its frame.
    """
    name, line, offset = str(path), 0, 0
    with path.open("rb", buffering=0) as file:
        meter.within = file.tell
        stream = _decompressed(cast(BinaryIO, file), path.name.lower())
        try:
            while data := stream.readline(reading.limit + 1):
                line += 1
                size = len(data)
                if size > reading.limit and not data.endswith(b"\n"):
                    size += _skip_line(stream)
                    reason = f"too long: a line of {size:,} bytes, more than the limit of {reading.limit:,} (--max-document-mb)"
                    yield Rejection(name, line, offset, reason, data[:KEPT])
                elif data.isspace():
                    yield Record(name, line, offset, "", "text")
                else:
                    yield Record(name, line, offset, data, "json")
                offset += size
        except (gzip.BadGzipFile, EOFError, zlib.error, _Damaged) as error:
            kind = "zstd" if isinstance(error, _Damaged) else "gzip"
            yield Rejection(name, line + 1, offset, f"damaged {kind}: {error}; the rest of the file is lost", b"")
        meter.within = lambda: 0


def _skip_line(stream: io.BufferedIOBase) -> int:
    """Read to the end of the line; how many bytes that took."""
    size = 0
    while data := stream.readline(1 << 20):
        size += len(data)
        if data.endswith(b"\n"):
            break
    return size


def _decompressed(file: BinaryIO, name: str) -> io.BufferedIOBase:
    if name.endswith(".gz"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)), 1 << 20)
    return io.BufferedReader(_Zstd(file) if name.endswith(".zst") else cast(io.RawIOBase, file), 1 << 20)


class _Zstd(io.RawIOBase):
    """The content of a .zst file of any number of frames. Unlike the package's own reader, it notices a file cut short."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            # A few kilobytes of input at a time, because what they unfold to is not bounded.
            self._input = self._input or self._file.read(1 << 12)
            if not self._input:
                if self._frame is not None:
                    raise _Damaged("the file ends within a frame")
                return 0
            self._unfold()
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _unfold(self) -> None:
        self._frame = self._frame or self._new_frame()
        try:
            self._output = self._frame.decompress(self._input)
        except self._error as error:
            raise _Damaged(str(error)) from None
        ended = self._frame.eof
        self._input = self._frame.unused_data if ended else b""
        self._frame = None if ended else self._frame


def read_parquet(path: Path, reading: Reading, meter: Meter) -> Iterator[Record | Rejection]:
    """A record for each row of a .parquet's text column; in memory is one row group of that column at most."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    name, size = str(path), path.stat().st_size
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        yield Rejection(name, 0, None, f"damaged parquet: {_one_line(error)}", b"")
        return
    with file:
        if (reason := _column_trouble(file, reading.text_key)) is not None:
            yield Rejection(name, 0, None, reason, b"")
            return
        first = 1
        for group in range(file.num_row_groups):
            meter.within = functools.partial(int, size * group / file.num_row_groups)
            yield from _read_group(name, file, group, first, reading)
            first += file.metadata.row_group(group).num_rows
    meter.within = lambda: 0


def _column_trouble(file: parquet.ParquetFile, column: str) -> str | None:
    import pyarrow.types as types

    schema = file.schema_arrow
    if column not in schema.names:
        found = ", ".join(schema.names[:8])
        return f"no column '{column}': the columns are {found}; name the right one with text_key (--text-key)"
    kind = schema.field(column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    return None if types.is_string(value) or types.is_large_string(value) else f"not text: the column '{column}' holds {kind}"


def _read_group(name: str, file: parquet.ParquetFile, group: int, first: int, reading: Reading) -> Iterator[Record | Rejection]:
    """The rows of one row group, numbered from `first`."""
    import pyarrow as arrow

    row = first
    try:
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=[reading.text_key], use_threads=False):
            column = batch.column(0)
            if arrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes, because a .parquet written carelessly holds texts that are not UTF-8.
            for value in column.cast(arrow.large_binary()):
                yield _row(name, row, value.as_py(), reading)
                row += 1
    except (arrow.ArrowException, OSError) as error:
        yield Rejection(name, row, None, f"damaged parquet: {_one_line(error)}; the rest of row group {group} is lost", b"")


def _row(name: str, row: int, value: bytes | None, reading: Reading) -> Record | Rejection:
    if value is None:
        return Rejection(name, row, None, "not text: null", b"")
    if len(value) > reading.limit:
        reason = f"too long: a text of {len(value):,} bytes, more than the limit of {reading.limit:,} (--max-document-mb)"
        return Rejection(name, row, None, reason, value[:KEPT])
    return Record(name, row, None, value, "utf8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
