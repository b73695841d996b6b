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
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_BLOCK = 2**24


def write_checkpoint(folder: Path, tensors: Sequence[tuple[str, Tensor]], content: dict[str, Any], extra: Iterable[Path] = ()) -> int:
    """Write a checkpoint folder atomically; returns its bytes.

    Args: tensors are (name, contiguous view) with full shapes; content is JSON for the manifest; extra are small files or
    folders that are copied in. Raises `UserError` when the disk is full (the former checkpoint stays intact).
    """
    partial = folder.with_name(f".{folder.name}.partial")
    needed = sum(tensor.nbytes for _, tensor in tensors) + 2**20
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _check_space(folder.parent, needed)
        partial.mkdir()
        name = "rank-00000.safetensors"
        files = {name: _write_safetensors(partial / name, tensors)}
        for source in extra:
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, partial / source.name)
        for file in sorted(p for p in partial.rglob("*") if p.is_file() and p.name != name):
            files[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        manifest = {"format": FORMAT, "version": VERSION, **content, "tensors": _describe(tensors, name), "files": files}
        text = json.dumps(manifest, indent=1).encode()
        _write_synced(partial / "manifest.json", text)
        _write_synced(partial / "COMPLETE", hashlib.sha256(text).hexdigest().encode())
        _publish(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(folder.parent, needed) from None
        raise UserError(f"{folder}: cannot write the checkpoint: {error.strerror}; earlier checkpoints are intact") from None
    return needed


def _describe(tensors: Sequence[tuple[str, Tensor]], file: str) -> dict[str, Any]:
    """Each tensor's dtype, full shape and pieces; a piece is a list of boxes in the full shape."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "pieces": [{"file": file, "key": name, "boxes": [{"offset": [0] * tensor.dim(), "size": list(tensor.shape)}]}],
        }
        for name, tensor in tensors
    }


def _write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Stream tensors into a safetensors file without a second copy in memory; returns its size and SHA-256."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors:
        header[name] = {"dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: bytes) -> None:
    with path.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, folder: Path) -> None:
    """Rename into place; a former folder of the same step (a damaged one) is moved aside first and removed last."""
    _sync_folder(partial)
    old = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise _disk_full(folder, needed)


def _disk_full(folder: Path, needed: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"{folder}: disk full: a checkpoint needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; "
        "earlier checkpoints are intact; free space or lower checkpoint.keep, then run the same command again"
    )
