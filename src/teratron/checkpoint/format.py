"""The checkpoint on disk: safetensors files under one JSON manifest with checksums, complete marker last (contract C10).

    step-00000100/
      rank-00000.safetensors   pieces of tensors, raw little-endian numbers behind a JSON header
      manifest.json            step, state, config, where every piece of every tensor lies, each file's size and SHA-256
      COMPLETE                 the manifest's SHA-256

Everything is written into `.step-00000100.partial`, flushed to disk, and renamed: a crash at any moment leaves the former
checkpoint intact and nothing that looks whole. Tensors and JSON only; nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.config import UserError

FORMAT, VERSION = "teratron-checkpoint", 1
TENSORS = "rank-00000.safetensors"
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_BLOCK = 2**24
_NO_ROOM = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "larger than a file may be here (ulimit -f)",
}


def write_checkpoint(folder: Path, tensors: Sequence[tuple[str, Tensor]], content: dict[str, Any], extra: Iterable[Path] = ()) -> None:
    """Write a checkpoint folder atomically; one writer at a time, which the run's lock sees to.

    Args: tensors are (name, contiguous view) with full shapes; content is JSON for the manifest; extra are small files or
    folders that are copied in. Raises `UserError` when the disk is full or not writable; earlier checkpoints stay intact.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    needed = checkpoint_bytes(tensors)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        check_space(folder.parent, needed)
        partial.mkdir()
        files = {TENSORS: _write_safetensors(partial / TENSORS, tensors)}
        for source in extra:
            files |= _copy(source, partial)
        manifest = {"format": FORMAT, "version": VERSION, **content, "tensors": _describe(tensors), "files": files}
        marker = write_synced(partial / "manifest.json", json.dumps(manifest, indent=1).encode())["sha256"]
        write_synced(partial / "COMPLETE", str(marker).encode())
        _publish(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _refusal(folder, error, needed) from None


def checkpoint_bytes(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Disk space that a checkpoint of these tensors takes, with room for its manifest and small files."""
    return sum(tensor.nbytes for _, tensor in tensors) + 2**20


def check_space(folder: Path, needed: int) -> None:
    """Raise `UserError` unless so many bytes are free where a folder lies."""
    if shutil.disk_usage(folder).free < needed:
        raise _no_room(folder, "disk full", needed)


def write_synced(path: Path, text: bytes) -> dict[str, Any]:
    """Write a small file and flush it to disk; returns its size and SHA-256."""
    with path.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Each tensor's dtype, full shape and pieces; a piece is a list of boxes in the full shape."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "pieces": [{"file": TENSORS, "key": name, "boxes": [{"offset": [0] * tensor.dim(), "size": list(tensor.shape)}]}],
        }
        for name, tensor in tensors
    }


def _write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Stream tensors into a safetensors file without a second copy in memory; returns its size and SHA-256."""
    header = _safetensors_header(tensors)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(header).to_bytes(8, "little"), header):
            file.write(chunk)
            digest.update(chunk)
        for _, tensor in tensors:
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            for start in range(0, raw.nbytes, _BLOCK):
                block = raw[start : start + _BLOCK].data
                file.write(block)
                digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _safetensors_header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """Where each tensor lies behind the header, as JSON padded to 8 bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors:
        place = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _copy(source: Path, target: Path) -> dict[str, dict[str, Any]]:
    """Copy a small file or folder into a folder, flushed to disk; returns each file's size and SHA-256 by name."""
    files = {}
    for path in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
        name = source.name / path.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        files[name.as_posix()] = write_synced(target / name, path.read_bytes())
    return files


def _publish(partial: Path, folder: Path) -> None:
    """Rename into place; a damaged former folder of the same step is moved aside first and removed last."""
    for place in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
        _sync_folder(place)
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}.replaced"))
    partial.rename(folder)
    _sync_folder(folder.parent)
    _remove_leftovers(folder.parent)


def _remove_leftovers(parent: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for leftover in (*parent.glob(".*.partial"), *parent.glob(".*.replaced")):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refusal(folder: Path, error: OSError, needed: int) -> UserError:
    if error.errno in _NO_ROOM:
        return _no_room(folder.parent, _NO_ROOM[error.errno], needed)
    return UserError(f"{folder}: cannot write the checkpoint: {error.strerror or error}; earlier checkpoints are intact")


def _no_room(folder: Path, reason: str, needed: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"{folder}: {reason}: a checkpoint needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; "
        "earlier checkpoints are intact; free space or lower checkpoint.keep, then run the same command again"
    )
