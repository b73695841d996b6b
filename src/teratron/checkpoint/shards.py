"""Safetensors files read as a stream: what they hold is known at once, a tensor is read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from teratron.checkpoint.mapped import DTYPES, MappedFile
from teratron.checkpoint.stream import Entry
from teratron.config import UserError


class Shards:
    """The tensors of some safetensors files by name, memory-mapped.

    Raises `UserError` that ends with `advice` for a file that cannot be read, and for a tensor that two files hold.
    """

    def __init__(self, files: Sequence[Path], advice: str) -> None:
        self.advice = advice
        self._opened = {path: self._open(path) for path in files}
        self._places: dict[str, Path] = {}
        for path, opened in self._opened.items():
            for name in opened.tensors:
                if name in self._places:
                    raise UserError(f"{path}: holds {name}, and so does {self._places[name].name}; {advice}")
                self._places[name] = path

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return list(self._places)

    def metadata(self, path: Path) -> dict[str, str]:
        """The text in a file's header."""
        return self._opened[path].metadata

    def entry(self, name: str) -> Entry:
        """A tensor by name. Raises `UserError` for numbers of a type that is not written here, such as of 8 bits."""
        path = self._places[name]
        kind, shape, *_ = self._opened[path].tensors[name]
        if kind not in DTYPES:
            raise UserError(f"{path}: {name} holds numbers of type {kind}, expected {'|'.join(DTYPES)}: use unquantised weights")
        return Entry(name, DTYPES[kind], shape, partial(self.read, name))

    def entries(self) -> Iterator[Entry]:
        return map(self.entry, self._places)

    def read(self, name: str) -> Tensor:
        """A tensor, memory-mapped."""
        return self._opened[self._places[name]].read(name)

    def _open(self, path: Path) -> MappedFile:
        from safetensors import SafetensorError

        try:
            return MappedFile(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); {self.advice}") from None
