"""Tensors of a checkpoint, whatever pieces they were saved in: regions of them, memory-mapped, and memory filled from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from teratron.checkpoint.manifest import StoredPiece, StoredTensor
from teratron.checkpoint.mapped import MappedFile, forget
from teratron.config import UserError
from teratron.parallel.boxes import Box, Piece

USE_EARLIER = "use an earlier checkpoint"


class Overlap(NamedTuple):
    """Elements that two lists of boxes share, and the memory where each has them."""

    box: Box
    source: Box
    source_start: int
    """Elements before the source box in its memory."""
    target: Box
    target_start: int


def overlaps(sources: Sequence[Box], targets: Sequence[Box]) -> Iterator[Overlap]:
    """What two lists of boxes of the same tensor share."""
    for source, source_start in _placed(sources):
        for target, target_start in _placed(targets):
            shared = source.meet(target)
            if shared is not None:
                yield Overlap(shared, source, source_start, target, target_start)


def _placed(boxes: Sequence[Box]) -> Iterator[tuple[Box, int]]:
    start = 0
    for box in boxes:
        yield box, start
        start += box.count


def _region(memory: Tensor, start: int, outer: Box, inner: Box) -> Tensor:
    """The view of a box inside another one, which begins at an element of contiguous memory."""
    return memory.view(-1)[start : start + outer.count].view(outer.size)[inner.inside(outer).slices()]


class TensorFiles:
    """The tensor files of a checkpoint, opened when needed; a context manager. Tensors read from them outlive it."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.folder = folder
        self.tensors = tensors
        self._files: dict[str, MappedFile] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.clear()

    def read(self, name: str, box: Box) -> Tensor:
        """A region of a tensor: a memory-mapped view where one piece holds it, else put together from the pieces.

        Raises `UserError` for a damaged file, `ValueError` for a box outside the tensor.
        """
        found = []
        for piece in self.tensors[name].pieces:
            shared = list(overlaps(piece.boxes, (box,)))
            if shared:
                memory = self.stored(name, piece)
                found += [(one.box, _region(memory, one.source_start, one.source, one.box)) for one in shared]
        if sum(part.count for part, _ in found) != box.count:
            raise ValueError(f"{name} has shape {list(self.tensors[name].shape)}, asked for {box}")
        if len(found) == 1:
            return found[0][1]
        out = torch.empty(box.size, dtype=self.tensors[name].dtype)
        for part, values in found:
            out[part.inside(box).slices()] = values
        return out

    def stored(self, name: str, piece: StoredPiece) -> Tensor:
        """A stored piece, memory-mapped; raises `UserError` when the file does not hold what the manifest says."""
        with _reading(self.folder):
            tensor = self._open(piece.file).read(piece.key)
            found, promised = [str(tensor.dtype), list(tensor.shape)], [str(self.tensors[name].dtype), list(piece.shape)]
            if found != promised:
                raise ValueError(f"{name} is {found}, the manifest says {promised}")
        return tensor

    def _open(self, file: str) -> MappedFile:
        if file not in self._files:
            self._files[file] = MappedFile(self.folder / file)
        return self._files[file]


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{folder}: damaged checkpoint: {error}; {USE_EARLIER}") from None


def fill_pieces(folder: Path, tensors: Mapping[str, StoredTensor], pieces: Iterable[Piece]) -> None:
    """Fill pieces of any layout from the pieces that were saved, in the dtype and on the device of each.

    One file is open at a time, and only the pages that overlap are read. Raises `UserError` for a damaged checkpoint.
    """
    jobs: dict[str, dict[StoredPiece, list[tuple[Piece, list[Overlap]]]]] = {}
    for piece in pieces:
        missing = piece.values.numel()
        for stored in tensors[piece.name].pieces:
            shared = list(overlaps(stored.boxes, piece.boxes))
            if shared:
                jobs.setdefault(stored.file, {}).setdefault(stored, []).append((piece, shared))
                missing -= sum(one.box.count for one in shared)
        if missing:
            raise UserError(f"{folder}: damaged checkpoint: {missing} elements of {piece.name} are missing; {USE_EARLIER}")
    for file in sorted(jobs):
        with TensorFiles(folder, tensors) as files:
            for stored, targets in jobs[file].items():
                _copy(files.stored(targets[0][0].name, stored), targets)


def _copy(memory: Tensor, targets: Iterable[tuple[Piece, Iterable[Overlap]]]) -> None:
    for piece, shared in targets:
        for one in shared:
            source = _region(memory, one.source_start, one.source, one.box)
            _region(piece.values, one.target_start, one.target, one.box).copy_(source)
        piece.done()
    forget(memory)
