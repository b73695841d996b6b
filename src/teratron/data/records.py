"""What travels from a file to a tokenizer: records, how their text is taken out, and what is said of those that have none."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

KEPT = 1 << 20
"""Bytes of a malformed item that are kept aside."""


class Record(NamedTuple):
    """A document, or a piece of a long one, as it was read."""

    file: str
    line: int
    """Line of a .jsonl or row of a .parquet, from 1; 0 = the whole file."""
    offset: int | None
    """Byte in the (decompressed) file at which it starts; None in a .parquet."""
    data: bytes | str
    form: Literal["json", "file", "utf8", "text"]
    """json: bytes of a JSON object; file: bytes of a whole text file; utf8: bytes of one text; text: decoded already."""
    part: Literal["whole", "more", "end"] = "whole"
    """whole: a document; more: a piece that others follow; end: the last piece."""


class Rejection(NamedTuple):
    """A malformed item: where it is, what is wrong, and its first bytes."""

    file: str
    line: int
    offset: int | None
    """Byte in the (decompressed) file at which the trouble is."""
    reason: str
    """`kind: detail`."""
    raw: bytes

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line else ""
        return f"{self.file}{line}{'' if self.offset is None else f', byte {self.offset}'}: {self.reason}"


class Malformed(Exception):
    """Data that is not what it should be; `offset` counts bytes from the start of the data."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.offset = offset


def reject(record: Record, error: Malformed) -> Rejection:
    raw = record.data if isinstance(record.data, bytes) else record.data.encode("utf-8", "surrogatepass")
    offset = None if record.offset is None else record.offset + error.offset
    return Rejection(record.file, record.line, offset, error.reason, raw[:KEPT])


def text_of(record: Record, text_key: str) -> str:
    """The text of a record. Raises `Malformed`."""
    if isinstance(record.data, str):
        return record.data
    if record.form == "json":
        return text_of_json(record.data, text_key)
    return text_of_file(record.data) if record.form == "file" else decode(record.data)


def text_of_file(data: bytes) -> str:
    """A text file's content, line ends as they are, without a byte-order mark."""
    refuse_compressed(data)
    refuse_binary(data)
    return decode(data).removeprefix("\ufeff")


def refuse_compressed(data: bytes) -> None:
    if data[:2] == b"\x1f\x8b" or data[:4] == b"\x28\xb5\x2f\xfd":
        raise Malformed("compressed: of compressed files only .jsonl.gz and .jsonl.zst are read; decompress it")


def refuse_binary(data: bytes, offset: int = 0) -> None:
    nul = data.find(b"\0")
    if nul >= 0:
        raise Malformed("binary: a NUL byte; expected UTF-8 text", offset + nul)


def decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: byte 0x{data[error.start]:02x}; convert the file to UTF-8", error.start) from None


def text_of_json(line: bytes, text_key: str) -> str:
    """The text in one line of JSON. Raises `Malformed` for anything but an object whose `text_key` holds valid text."""
    text = decode(line.rstrip(b"\r\n")).removeprefix("\ufeff")
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg}", len(text[: error.pos].encode())) from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Malformed(f"not an object: a JSON {_kind(value)}; expected an object with the key '{text_key}'")
    if text_key not in value:
        found = ", ".join(list(value)[:8]) or "none"
        raise Malformed(f"no key '{text_key}': the keys are {found}; name the right one with text_key (--text-key)")
    found = value[text_key]
    if not isinstance(found, str):
        raise Malformed(f"not text: the key '{text_key}' holds a {_kind(found)}")
    # Only an escape can smuggle half of a surrogate pair into decoded text; looking for one is cheaper than encoding all.
    if b"\\u" in line and any("\ud800" <= char <= "\udfff" for char in found):
        raise Malformed("not Unicode: half of a surrogate pair is escaped in the text")
    return found


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}.get(type(value), "number")
