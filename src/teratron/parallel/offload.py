"""Where masters and moments lie between updates (`parallel.offload`): with the weights, in host memory beside a GPU, or in files.

An optimizer takes a bucket's tensors out with `bring` and puts them back with `keep`; `soon` and `done` say what is needed next and what
is not needed for now, so that the way there and back goes on beside the update of another bucket. What is computed is the same bit for bit.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from teratron.config import ParallelConfig, UserError

PAGE = 4096
WAITING = 4
"""Tensors that may wait to be written to disk."""
DONTNEED, _WILLNEED, _POPULATE_WRITE = 4, 3, 23
"""What Linux calls the ways to use a range of memory (madvise)."""


class Home:
    """With the weights: nothing has a way to go."""

    apart: ClassVar = False
    """Whether what is kept lies elsewhere."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        """Where updates are computed."""

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory for so many numbers."""
        return torch.zeros(count, dtype=dtype, device=self.device)

    def hold(self, values: Tensor) -> Tensor:
        """A copy of a flat tensor that lies here."""
        return self.zeros(values.numel(), values.dtype).copy_(values)

    def bring(self, kept: Tensor) -> Tensor:
        """What is kept, on the device; the same tensor where it is there."""
        return kept.to(self.device)

    def keep(self, kept: Tensor, changed: Tensor) -> None:
        """Put what `bring` gave, and what has been changed since, back in its place."""
        if changed is not kept:
            kept.copy_(changed)

    def clear(self, kept: Tensor) -> None:
        """Make what is kept zeros."""
        kept.zero_()

    def soon(self, kept: Iterable[Tensor]) -> None:
        """These are brought next."""

    def done(self, kept: Iterable[Tensor]) -> None:
        """Nobody reads or writes these for now."""

    def settle(self) -> None:
        """Wait until everything is in its place, where the host may read it."""


class HostMemory(Home):
    """In the host's memory; a GPU's copies of one bucket go out and those of the next come in on a stream of their own."""

    apart: ClassVar = True

    def __init__(self, device: str | torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.coming: dict[int, Tensor] = {}
        """On their way to the device, by the address of what is kept."""

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, pin_memory=self.stream is not None)

    def soon(self, kept: Iterable[Tensor]) -> None:
        with torch.cuda.stream(self.stream):
            for tensor in (tensor for tensor in kept if tensor.device.type == "cpu"):
                self.coming[tensor.data_ptr()] = tensor.to(self.device, non_blocking=True, copy=True)

    def bring(self, kept: Tensor) -> Tensor:
        if kept.device.type != "cpu":
            return kept
        if kept.data_ptr() not in self.coming:
            self.soon([kept])
        here = self.coming.pop(kept.data_ptr())
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.stream)
            here.record_stream(now)
        return here

    def keep(self, kept: Tensor, changed: Tensor) -> None:
        if changed is kept:
            return
        self.coming.pop(kept.data_ptr(), None)  # it is not that any more
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            changed.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            kept.copy_(changed, non_blocking=True)

    def settle(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


class Disk(Home):
    """In files without names, mapped into memory: whatever reads or writes them works, and pages go when they are not needed.

    One thread reads ahead, another writes what was changed and lets the system forget it. Nothing is left when the process ends.
    """

    apart: ClassVar = True

    def __init__(self, device: str | torch.device, folder: Path) -> None:
        super().__init__(device)
        self.folder = folder
        self._files: dict[int, int] = {}
        """File numbers by the addresses of tensors."""
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._coming: dict[int, Future[None]] = {}
        self._going: deque[Future[None]] = deque()

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        if not size:
            return torch.zeros(count, dtype=dtype)
        try:
            if shutil.disk_usage(self.folder).free < size:  # some systems would find out by writing until the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            number, name = tempfile.mkstemp(prefix=".offload-", dir=self.folder)
            try:
                _reserve(number, size)
                tensor = torch.from_file(name, shared=True, size=count, dtype=dtype)
            finally:
                os.unlink(name)
        except OSError as error:
            raise UserError(
                f"parallel.offload*: {self.folder}: no file of {size / 2**20:,.0f} MiB can be made ({error.strerror or error}): "
                "free some space, or name a folder on another disk with parallel.offload_folder"
            ) from None
        self._files[tensor.data_ptr()] = number
        weakref.finalize(tensor, self._close, tensor.data_ptr())
        return tensor

    def _close(self, address: int) -> None:
        os.close(self._files.pop(address))

    def soon(self, kept: Iterable[Tensor]) -> None:
        for tensor in kept:
            if tensor.data_ptr() in self._files:
                self._coming[tensor.data_ptr()] = self._reader.submit(self._read, tensor)

    def _read(self, tensor: Tensor) -> None:
        advise(tensor, _WILLNEED)
        advise(tensor, _POPULATE_WRITE)

    def bring(self, kept: Tensor) -> Tensor:
        if kept.data_ptr() in self._coming:
            self._coming.pop(kept.data_ptr()).result()
        return super().bring(kept)

    def done(self, kept: Iterable[Tensor]) -> None:
        for tensor in kept:
            if tensor.data_ptr() in self._files:
                advise(tensor, DONTNEED)
                self._going.append(self._writer.submit(self._write, tensor))
        while len(self._going) > WAITING:  # else what waits to be written fills the memory
            self._going.popleft().result()

    def clear(self, kept: Tensor) -> None:
        number = self._files.get(kept.data_ptr())
        if number is not None:
            os.ftruncate(number, 0)
            _reserve(number, kept.nbytes)

    def _write(self, tensor: Tensor) -> None:
        number = self._files[tensor.data_ptr()]
        os.fdatasync(number)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def _reserve(number: int, size: int) -> None:
    """Room for a file, so that a full disk is known now and not when its pages are written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(number, 0, size)
    else:
        os.ftruncate(number, size)


def home_of(parallel: ParallelConfig, device: torch.device, folder: Path, key: str = "offload") -> Home:
    """What a key of `parallel.*` asks for; folder: where files lie unless `parallel.offload_folder` says so.

    Raises `UserError` for what makes no sense on the device, and for a folder that is not there.
    """
    where = getattr(parallel, key)
    if where == "none":
        return Home(device)
    if where == "cpu":
        if device.type == "cpu":
            raise UserError(f"parallel.{key} = cpu on a CPU, where it lies already: choose --parallel.{key} disk, or leave it out")
        return HostMemory(device)
    folder = Path(parallel.offload_folder or folder)
    if not folder.is_dir():
        raise UserError(f"parallel.offload_folder = {folder}: no such folder: make it, or leave it out to use the run's own")
    return Disk(device, folder)


def advise(tensor: Tensor, way: int) -> None:
    """Tell Linux how the pages of a contiguous tensor will be used; elsewhere nothing. Only whole pages inside it."""
    if sys.platform != "linux":
        return
    start, stop = -(-tensor.data_ptr() // PAGE) * PAGE, (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    if start < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), way)
