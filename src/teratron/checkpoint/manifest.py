"""The manifest of a checkpoint: where every piece of every tensor lies, and the check that nothing is missing, twice or outside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch

from teratron.checkpoint.stream import NAMES
from teratron.parallel.boxes import Box, Piece

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}


@dataclass(frozen=True)
class StoredPiece:
    """A tensor of a safetensors file: one box in its own shape, or several one behind the other in one dimension."""

    file: str
    key: str
    boxes: tuple[Box, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return sum(box.count for box in self.boxes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return self.boxes[0].size if len(self.boxes) == 1 else (self.count,)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint; its pieces hold each element once."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def plan_pieces(pieces: Iterable[Piece], file: str) -> list[tuple[Piece, StoredPiece]]:
    """Where a rank's pieces will lie in its file. A tensor that is stored whole keeps its plain name as key."""
    planned = []
    for piece in pieces:
        stored = StoredPiece(file, _key(piece), piece.boxes)
        if piece.values.numel() != stored.count:
            raise ValueError(f"{piece.name}: {piece.values.numel()} values for boxes of {stored.count} elements")
        planned.append((piece, stored))
    return planned


def _key(piece: Piece) -> str:
    if piece.boxes == (whole(piece.shape),):
        return piece.name
    return f"{piece.name}@{','.join(map(str, piece.boxes[0].offset))}"


def describe_pieces(planned: Iterable[tuple[Piece, StoredPiece]]) -> dict[str, Any]:
    """A rank's share of the manifest's `tensors`, as JSON."""
    tensors: dict[str, Any] = {}
    for piece, stored in planned:
        empty = {"dtype": str(piece.values.dtype).removeprefix("torch."), "shape": list(piece.shape), "pieces": []}
        boxes = [{"offset": list(box.offset), "size": list(box.size)} for box in stored.boxes]
        tensors.setdefault(piece.name, empty)["pieces"].append({"file": stored.file, "key": stored.key, "boxes": boxes})
    return tensors


def join_descriptions(descriptions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All ranks' shares as one; raises `RuntimeError` when together they do not hold each element of each tensor once."""
    tensors: dict[str, Any] = {}
    for description in descriptions:
        for name, entry in description.items():
            joined = tensors.setdefault(name, {**entry, "pieces": []})
            if (joined["dtype"], joined["shape"]) != (entry["dtype"], entry["shape"]):
                raise RuntimeError(f"ranks differ about {name}: {joined['dtype']}{joined['shape']}, {entry['dtype']}{entry['shape']}")
            joined["pieces"].extend(entry["pieces"])
    for name, entry in tensors.items():
        try:
            _tensor(name, entry)
        except ValueError as error:
            raise RuntimeError(f"the ranks' pieces do not make up the training state: {error}") from None
    return tensors


def read_tensors(manifest: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of a manifest; raises `ValueError`, `TypeError` or `KeyError` for what no writer makes."""
    _check_head(manifest)
    _check_files(manifest["files"])
    tensors = {name: _tensor(name, entry) for name, entry in manifest["tensors"].items()}
    places: set[tuple[str, str]] = set()
    for tensor in tensors.values():
        for piece in tensor.pieces:
            if piece.file not in manifest["files"]:
                raise ValueError(f"tensor '{tensor.name}' lies in no file of the checkpoint")
            if piece.count * tensor.dtype.itemsize > manifest["files"][piece.file]["bytes"]:
                raise ValueError(f"a piece of tensor '{tensor.name}' is larger than its file")
            if (piece.file, piece.key) in places:
                raise ValueError(f"two pieces lie at '{piece.key}' of {piece.file}")
            places.add((piece.file, piece.key))
    return tensors


def _check_head(manifest: Mapping[str, Any]) -> None:
    if not _integer(manifest["step"]) or not isinstance(manifest["config"], dict):
        raise TypeError("step is no integer or config no object")
    if not isinstance(manifest.get("layout", {}), dict):
        raise TypeError("layout is no object")
    written = manifest.get("time", 0)
    if not isinstance(written, (int, float)) or not 0 <= written < 2**37:
        raise ValueError("time is not in seconds since 1970")


def _check_files(files: Mapping[str, Any]) -> None:
    for name, recorded in files.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(f"file '{name}' lies outside the checkpoint")
        if not _integer(recorded["bytes"]) or not isinstance(recorded["sha256"], str):
            raise TypeError(f"size or checksum of file '{name}'")


def _tensor(name: str, entry: Mapping[str, Any]) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"tensor '{name}' holds {entry['dtype']!r}, expected one of {', '.join(_DTYPES)}")
    shape = _sizes(name, entry["shape"])
    pieces = tuple(_piece(name, shape, piece) for piece in entry["pieces"])
    boxes = [box for piece in pieces for box in piece.boxes]
    if sum(box.count for box in boxes) != math.prod(shape):
        raise ValueError(f"the pieces of tensor '{name}' hold {sum(box.count for box in boxes)} elements of {math.prod(shape)}")
    if _overlap(boxes):
        raise ValueError(f"pieces of tensor '{name}' overlap")
    return StoredTensor(name, _DTYPES[entry["dtype"]], shape, pieces)


def _piece(name: str, shape: tuple[int, ...], piece: Mapping[str, Any]) -> StoredPiece:
    boxes = tuple(Box(_sizes(name, box["offset"]), _sizes(name, box["size"])) for box in piece["boxes"])
    for box in boxes:
        if not len(box.offset) == len(box.size) == len(shape) or box.meet(whole(shape)) != box:
            raise ValueError(f"a piece of tensor '{name}' does not fit its shape {list(shape)}")
    if not boxes or not isinstance(piece["file"], str) or not isinstance(piece["key"], str):
        raise ValueError(f"a piece of tensor '{name}' has no place")
    return StoredPiece(piece["file"], piece["key"], boxes)


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(_integer(value) and value >= 0 for value in values):
        raise ValueError(f"tensor '{name}' has offsets or sizes {values!r}, expected integers of at least 0")
    return tuple(values)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _overlap(boxes: Sequence[Box], dimension: int = 0, uncut: int = 0) -> bool:
    """Whether any two boxes meet: cut them apart along one dimension after the other, and compare pairs only where no cut helps."""
    if len(boxes) < 2:
        return False
    if uncut == len(boxes[0].size):
        return any(a.meet(b) for i, a in enumerate(boxes) for b in boxes[:i])
    groups, end = [], -1
    for box in sorted(boxes, key=lambda box: box.offset[dimension]):
        if box.offset[dimension] >= end:
            groups.append([box])
        else:
            groups[-1].append(box)
        end = max(end, box.offset[dimension] + box.size[dimension])
    following = (dimension + 1) % len(boxes[0].size)
    return any(_overlap(group, following, 0 if len(groups) > 1 else uncut + 1) for group in groups)
