"""Checkpoints in the machine's memory: the same folders as on disk, on a file system that outlives the processes but not the machine.

A run's folder there is named after the run's absolute path and a word drawn by chance, which the run keeps in `.memory`: one that is
begun anew where another has been deleted never finds what that one left.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path

from teratron.checkpoint.format import discard
from teratron.config import UserError

PLACE = Path("/dev/shm")
NOTE = ".memory"


def memory_folder(run: Path) -> Path | None:
    """Where a run has checkpoints in the memory of this machine; None where it has none."""
    try:
        word = (run / NOTE).read_text("ascii").strip()
        folder = PLACE / f"{_prefix(run)}-{word}"
        return folder if folder.lstat().st_uid == os.getuid() and folder.is_dir() else None
    except (OSError, ValueError):
        return None


def make_memory_folder(run: Path, needed: int) -> Path:
    """The same, made where there is none; raises `UserError` unless two checkpoints of `needed` bytes fit."""
    if not PLACE.is_dir():
        raise UserError(f"checkpoint.memory_every: there is no {PLACE} on this machine: leave it out")
    folder = memory_folder(run)
    if folder is None:
        remove_memory(run)
        word = secrets.token_hex(8)
        folder = PLACE / f"{_prefix(run)}-{word}"
        folder.mkdir(0o700)
        (run / NOTE).write_text(word, "ascii")
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(PLACE).free + held
    if free < 2 * needed:
        raise UserError(
            f"checkpoint.memory_every: two checkpoints of {needed / 2**20:,.0f} MiB do not fit into {PLACE}, where {free / 2**20:,.0f} MiB "
            "are free: free some, enlarge it, or leave the key out"
        )
    return folder


def remove_memory(run: Path) -> None:
    """Remove what a run of this path holds in memory."""
    for folder in PLACE.glob(f"{_prefix(run)}-*"):
        if folder.lstat().st_uid == os.getuid():
            discard(folder)
    (run / NOTE).unlink(missing_ok=True)


def _prefix(run: Path) -> str:
    digest = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16]
    return f"teratron-{os.getuid()}-{digest}"
