"""Files of `torch.save`, read lazily and without being run: a pickle beside memory-mapped numbers."""

from __future__ import annotations

import io
import math
import mmap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teratron.checkpoint.megatron.pickles import Global, Readers, read_pickle
from teratron.config import UserError

_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8,
}  # fmt: skip
"""What the classes of storages hold."""
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_HEADER = 30
"""Bytes of a zip member's header, before its name."""


class Storage(NamedTuple):
    """Numbers in a file, one behind the other."""

    dtype: torch.dtype
    length: int
    data: Callable[[], Tensor]
    """Its bytes, uint8, memory-mapped."""


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]
    """The tensor, memory-mapped."""


class MappedFile:
    """A file in memory, of which only the pages that are used are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise UserError(f"{path}: missing from the checkpoint: copy the folder again") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}): copy it again") from None

    def data(self, start: int, count: int) -> Tensor:
        """So many bytes as uint8; raises `UserError` where the file is shorter."""
        if start < 0 or start + count > len(self.bytes):
            raise UserError(f"{self.path}: ends at byte {len(self.bytes):,}, expected {start + count:,}: it is truncated, copy it again")
        return torch.frombuffer(self.bytes, dtype=torch.uint8, count=count, offset=start) if count else torch.empty(0, dtype=torch.uint8)


class _Window(io.RawIOBase):
    """A region of a mapped file as a file of its own."""

    def __init__(self, source: MappedFile, start: int, size: int) -> None:
        self.view = memoryview(source.bytes)[start : start + size]
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: len(self.view)}[whence]
        if self.place < 0:
            raise OSError("a place before the file")
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        found = self.view[self.place : self.place + len(buffer)]
        buffer[: len(found)] = found
        self.place += len(found)
        return len(found)


def load_torch(path: Path) -> Any:
    """The content of a file of `torch.save`: its tensors as `Stored`, classes as `Record`.

    Raises `UserError` for any other file, a truncated one, and for one that would call something.
    """
    source = MappedFile(path)
    return load_region(source, 0, len(source.bytes))


def load_region(source: MappedFile, start: int, size: int) -> Any:
    """The same of a region of a file."""
    if source.bytes[start : start + 4] == b"PK\x03\x04":
        return _load_zip(source, start, size)
    return _load_old(source, start, size)


def _load_zip(source: MappedFile, start: int, size: int) -> Any:
    try:
        with zipfile.ZipFile(_Window(source, start, size)) as archive:
            members = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            pickled = archive.read(members["data.pkl"])
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{source.path}: not a whole file of torch.save ({error}): it is truncated or damaged, copy it again") from None

    def stored(identity: Any) -> Storage:
        _, kind, key, _, count = identity
        dtype = _dtype_of(kind)
        member = members[f"data/{key}"]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < count * dtype.itemsize:
            raise ValueError(f"says that data/{key} holds {count} numbers")

        def data() -> Tensor:
            head = start + member.header_offset
            names = source.data(head + 26, 4).tolist()
            first = head + _HEADER + names[0] + 256 * names[1] + names[2] + 256 * names[3]
            return source.data(first, count * dtype.itemsize)

        return Storage(dtype, count, data)

    return read_pickle(io.BytesIO(pickled), str(source.path), _TENSORS, stored)


def _load_old(source: MappedFile, start: int, size: int) -> Any:
    """A file as torch wrote it before 1.6: pickles in a row, then the numbers of each storage behind their count."""
    file, name = io.BufferedReader(_Window(source, start, size)), str(source.path)
    try:
        magic = read_pickle(file, name)
    except UserError:
        magic = None
    if magic != _OLD_MAGIC:
        raise UserError(f"{source.path}: not a file of torch.save: it is truncated or something else, copy it again")
    version, _ = read_pickle(file, name), read_pickle(file, name)
    if version != 1001:
        raise UserError(f"{source.path}: found version {version} of torch's old format, expected 1001: save it again with a newer torch")
    places: dict[str, tuple[int, int]] = {}
    sizes: dict[str, int] = {}

    def stored(identity: Any) -> Storage:
        _, kind, key, _, count, view = identity
        if view is not None:
            raise ValueError("shares a storage in part")
        dtype = _dtype_of(kind)
        sizes[key] = dtype.itemsize
        return Storage(dtype, count, lambda: source.data(*places[key]))

    content = read_pickle(file, name, _TENSORS, stored)
    keys, place = read_pickle(file, name), start + file.tell()
    for key in keys:
        count = int.from_bytes(source.data(place, 8).numpy().tobytes(), "little")
        places[key] = place + 8, count * sizes[key]
        place += 8 + count * sizes[key]
    source.data(place, 0)
    return content


def _dtype_of(kind: Any) -> torch.dtype:
    """Of a storage's class."""
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    if name.removesuffix("Storage") not in _STORAGES:
        raise ValueError(f"holds numbers of an unknown kind {name}")
    return _STORAGES[name.removesuffix("Storage")]


def dtype_named(found: Any) -> torch.dtype:
    """The type of numbers that a pickle names; raises `ValueError` for other things."""
    dtype = getattr(torch, found.name.removeprefix("torch."), None) if isinstance(found, Global) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"names {found!r} as a type of numbers")
    return dtype


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Stored:
    """torch._utils._rebuild_tensor_v2."""
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else offset - 1
    if offset < 0 or min(stride, default=0) < 0 or last >= storage.length:
        raise ValueError("holds a tensor that is larger than its numbers")

    def values() -> Tensor:
        data = storage.data()
        aligned = data if data.data_ptr() % storage.dtype.itemsize == 0 else data.clone()
        return aligned.view(storage.dtype).as_strided(shape, stride, offset)

    return Stored(storage.dtype, tuple(shape), values)


def _typed_tensor(storage: Storage, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Stored:
    """torch._utils._rebuild_tensor_v3, whose storage has no type."""
    kind = dtype_named(dtype)
    return _tensor(Storage(kind, storage.length // kind.itemsize, storage.data), offset, shape, stride)


_TENSORS: Readers = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda _function, _kind, arguments, _state: _tensor(*arguments),
}
"""How tensors are pickled."""
