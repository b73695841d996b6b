"""The checkpoint on disk: safetensors files under one JSON manifest with checksums, complete marker last (contract C10).

    step-00000100/
      rank-00000.safetensors   pieces of tensors, raw little-endian numbers behind a JSON header; one file a rank
      manifest.json            step, state, config, where every piece of every tensor lies, each file's size and SHA-256
      COMPLETE                 the manifest's SHA-256

Everything is written into `.step-00000100.partial`, flushed to disk, and renamed: a crash at any moment leaves the former
checkpoint intact and nothing that looks whole. Tensors and JSON only; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from teratron.checkpoint.agree import ALONE, agree, gather_json
from teratron.checkpoint.machines import Machines, deliver
from teratron.checkpoint.manifest import StoredPiece, describe_pieces, join_descriptions, plan_pieces
from teratron.checkpoint.stream import Entry, write_safetensors
from teratron.config import UserError
from teratron.parallel.boxes import Piece
from teratron.parallel.mesh import Group

FORMAT, VERSION = "teratron-checkpoint", 1
SEAL = ("manifest.json", "COMPLETE")
"""The files behind which the others stand, and which are written last."""
_NO_ROOM = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "larger than a file may be here (ulimit -f)",
}


def write_checkpoint(
    folder: Path,
    pieces: Iterable[Piece],
    content: Mapping[str, Any],
    extra: Iterable[Path] = (),
    group: Group = ALONE,
    machines: Machines | None = None,
) -> None:
    """Write a checkpoint folder atomically: a collective, in which each rank writes the pieces that it is the first to hold.

    One job at a time writes, which the run's lock sees to; the folder lies on a file system that all ranks share, or on one of each
    of `machines`, which then holds the files of its own ranks and a copy of those of the machine before.

    Args: content is JSON for the manifest; extra are small files or folders that are copied in (both are rank 0's, and the same on
    every machine). Raises the same `UserError` on all ranks when any of them cannot write; earlier checkpoints stay intact.
    """
    machines = machines or Machines(group.rank, group.size, group.size)
    if machines.several:
        content = gather_json(group, dict(content) if group.rank == 0 else None)[0]
    planned = plan_pieces(saved_pieces(pieces), tensor_file(group.rank))
    tensors = join_descriptions(gather_json(group, describe_pieces(planned)))
    needed = checkpoint_bytes((piece for piece, _ in planned), group)
    partial = folder.with_name(f".{folder.name}.partial")

    @_refusing(folder, needed)
    def begin() -> None:
        if machines.leads:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder.parent)
            check_space(folder.parent, needed)
            partial.mkdir()

    @_refusing(folder, needed)
    def write() -> dict[str, Any]:
        return _write_safetensors(partial, planned) if planned else {}

    @_refusing(folder, needed)
    def finish() -> None:
        if machines.leads:
            copied = [_copy(source, partial) for source in extra]
            files = {name: entry for some in (*written, *copied) for name, entry in some.items()}
            _seal(partial, {"format": FORMAT, "version": VERSION, **content, "tensors": tensors, "files": files})
            publish(partial, folder)

    try:
        agree(group, begin)
        written = agree(group, write)
        if machines.several:
            deliver(partial, machines.copies(written), group)
        agree(group, finish)
    except UserError:
        if machines.leads:
            discard(partial)
        raise


def tensor_file(rank: int) -> str:
    """The name of a rank's file of tensors."""
    return f"rank-{rank:05d}.safetensors"


def checkpoint_bytes(pieces: Iterable[Piece], group: Group = ALONE) -> int:
    """Disk space that a checkpoint of all ranks' pieces takes, with room for its manifest and small files; a collective."""
    mine = sum(piece.values.nbytes for piece in saved_pieces(pieces))
    return int(sum(gather_json(group, mine))) + 2**20


def saved_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Those that this rank writes."""
    return [piece for piece in pieces if piece.first and piece.values.numel()]


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


def _write_safetensors(folder: Path, planned: Sequence[tuple[Piece, StoredPiece]]) -> dict[str, Any]:
    """Write this rank's file; returns its size and SHA-256 by its name."""
    if not folder.is_dir():
        raise UserError(f"{folder.parent}: not seen by every rank: give a --run folder on a file system that all nodes share")
    name = planned[0][1].file

    def values(number: int) -> Tensor:
        if number:
            planned[number - 1][0].done()  # it has been written
        return planned[number][0].values

    entries = [Entry(stored.key, p.values.dtype, stored.shape, functools.partial(values, n)) for n, (p, stored) in enumerate(planned)]
    written = write_safetensors(folder / name, entries)
    planned[-1][0].done()
    return {name: written}


def _seal(partial: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest and, last, the marker that the checkpoint is complete."""
    marker = write_synced(partial / "manifest.json", json.dumps(manifest, indent=1).encode())["sha256"]
    write_synced(partial / "COMPLETE", str(marker).encode())


def _copy(source: Path, target: Path) -> dict[str, dict[str, Any]]:
    """Copy a small file or folder into a folder, flushed to disk; returns each file's size and SHA-256 by name."""
    files = {}
    for path in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
        name = source.name / path.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        files[name.as_posix()] = write_synced(target / name, path.read_bytes())
    return files


def publish(partial: Path, folder: Path) -> None:
    """Rename into place; a damaged former folder of the same step is moved aside first and removed last."""
    for place in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
        sync_folder(place)
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}.replaced"))
    partial.rename(folder)
    sync_folder(folder.parent)
    _remove_leftovers(folder.parent)


def _remove_leftovers(parent: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for leftover in (*parent.glob(".*.partial"), *parent.glob(".*.replaced")):
        discard(leftover)


def discard(folder: Path) -> None:
    """Remove a folder of no more use, as far as it can be."""
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _refusing(folder: Path, needed: int) -> Iterator[None]:
    """Turn the operating system's refusal to write a checkpoint into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(folder.parent, _NO_ROOM[error.errno], needed) from None
        raise UserError(f"{folder}: cannot write the checkpoint: {error.strerror or error}; earlier checkpoints are intact") from None


def _no_room(folder: Path, reason: str, needed: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"{folder}: {reason}: a checkpoint needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; "
        "earlier checkpoints are intact; free space or lower checkpoint.keep, then run the same command again"
    )
