"""A safetensors file mapped into memory: its tensors are views of the file, whose pages come when they are read and can go again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teratron.checkpoint.stream import NAMES
from teratron.parallel.offload import DONTNEED, advise

DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Stored(NamedTuple):
    """A tensor in a file."""

    kind: str
    """What safetensors calls its numbers."""
    shape: tuple[int, ...]
    start: int
    """Bytes before it in the file."""
    stop: int


class MappedFile:
    """The tensors of one file by name. What is written to them stays in this process.

    Raises what the safetensors package does, `OSError` or `ValueError` for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as opened:  # which checks the header against the file
            self.metadata: dict[str, str] = opened.metadata() or {}
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self.tensors = {
            name: Stored(entry["dtype"], tuple(entry["shape"]), *(8 + size + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        }
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        """A tensor, without a copy unless it lies at an odd place. Raises `ValueError` for a name or type that is not there."""
        if name not in self.tensors:
            raise ValueError(f"it holds no {name}")
        kind, shape, start, stop = self.tensors[name]
        if kind not in DTYPES:
            raise ValueError(f"{name} holds numbers of type {kind}")
        flat, dtype = self._bytes[start:stop], DTYPES[kind]
        return (flat.clone() if start % dtype.itemsize else flat).view(dtype).view(shape)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other along the first dimension: as they lie where they do so in the same file, else copied.

    What was copied goes out of memory where it came from a file.
    """
    first = tensors[0]
    if _adjacent(tensors):
        rows = sum(tensor.shape[0] for tensor in tensors)
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    made = torch.cat(list(tensors))
    for tensor in tensors:
        forget(tensor)
    return made


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    storage, place = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or (tensor.untyped_storage().data_ptr(), tensor.data_ptr()) != (storage, place):
            return False
        place += tensor.nbytes
    return True


def forget(tensor: Tensor) -> None:
    """Take a contiguous tensor's pages out of this process's memory if a file holds them; they come again when they are read."""
    if tensor.is_shared() and tensor.is_contiguous():  # "shared" is what PyTorch calls all memory that is mapped
        advise(tensor, DONTNEED)
