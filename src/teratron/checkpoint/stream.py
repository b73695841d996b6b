"""Safetensors files written as a stream: raw little-endian numbers behind a JSON header, never a second copy in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
"""What safetensors calls the types of numbers that are stored."""
ALIGNED = 64
"""Tensors begin at a multiple of so many bytes, which products of a mapped file are fastest with."""
_BLOCK = 2**24
"""Bytes converted, hashed and written at once."""


class Entry(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    """The type in the file; values of another type are converted block by block."""
    shape: Sequence[int]
    values: Callable[[], Tensor]
    """Gives the numbers, on any device; called once, when their turn has come."""


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write tensors into a file and flush it to disk; returns its size in bytes and SHA-256.

    Args: metadata is text kept in the header. Raises `OSError` when the disk refuses.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(block: bytes | memoryview) -> None:
            file.write(block)
            digest.update(block)

        header = _header(entries, metadata or {})
        put(len(header).to_bytes(8, "little"))
        put(header)
        for entry in entries:
            _put_values(entry, put)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # who verifies it shall read the disk, not what the system remembers
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = file.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}


def _put_values(entry: Entry, put: Callable[[memoryview], None]) -> None:
    """A tensor's bytes; nothing of it is held after the return."""
    flat = entry.values().detach().reshape(-1)
    for block in flat.split(max(1, _BLOCK // flat.element_size())):
        put(block.to("cpu", entry.dtype).contiguous().view(torch.uint8).numpy().data)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Where each tensor lies behind the header, as JSON padded so that they begin at an even place."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape, _ in entries:
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % ALIGNED)
