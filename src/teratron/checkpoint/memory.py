"""Checkpoints in the machines' memory: the same folders as on disk, on a file system that outlives the processes but not the machine.

Of several machines each holds its own ranks' files and a copy of those of the machine before, so that one may be lost.

A run's folder there is named after the run's absolute path and a word drawn by chance, which the run keeps in `.memory`: one that is
begun anew where another has been deleted never finds what that one left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from teratron.checkpoint.agree import agree, gather_json
from teratron.checkpoint.format import SEAL, discard
from teratron.checkpoint.machines import Delivery, Machines, deliver
from teratron.checkpoint.reader import Candidate, candidates, checkpoint_folders, open_checkpoint
from teratron.config import UserError
from teratron.parallel.mesh import Group

PLACE = Path("/dev/shm")
NOTE = ".memory"


def memory_folder(run: Path) -> Path | None:
    """Where a run has checkpoints in the memory of this machine; None where it has none."""
    try:
        folder = _noted(run)
        return folder if folder.lstat().st_uid == os.getuid() and folder.is_dir() else None
    except (OSError, ValueError):
        return None


def make_memory_folder(run: Path, needed: int, first: bool = True) -> Path:
    """The same, made where there is none; raises `UserError` unless two checkpoints of `needed` bytes fit.

    first: whether this is the first machine, which draws the word; the others come after it.
    """
    if not PLACE.is_dir():
        raise UserError(f"checkpoint.memory_every: there is no {PLACE} on this machine: leave it out")
    folder = memory_folder(run)
    if folder is None:
        _remove_folders(run)
        if not first and not (run / NOTE).exists():
            raise UserError(f"{run}: not seen by every machine: give a --run folder on a file system that all nodes share")
        if first:
            (run / NOTE).write_text(secrets.token_hex(8), "ascii")
        folder = _noted(run)
        folder.mkdir(0o700)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(PLACE).free + held
    if free < 2 * needed:
        raise UserError(
            f"checkpoint.memory_every: two checkpoints of {needed / 2**20:,.0f} MiB do not fit into {PLACE}, where {free / 2**20:,.0f} MiB "
            "are free: free some, enlarge it, or leave the key out"
        )
    return folder


def remove_memory(run: Path) -> None:
    """Remove what a run of this path holds in the memory of this machine."""
    _remove_folders(run)
    (run / NOTE).unlink(missing_ok=True)


def memory_checkpoints(run: Path, machines: Machines, group: Group, warn: Callable[[str], None]) -> list[Candidate]:
    """A run's checkpoints in memory, good or not; a collective.

    Of several machines the newest whose files are all held, good, by any: the machines that lack one get it from a holder. Newer ones
    are told to `warn` and passed over, and so is every damaged file.
    """
    if not machines.several:
        folder = memory_folder(run) if machines.each else None
        return candidates(folder) if folder else []
    reports = gather_json(group, _held(run, machines))
    for sentence in dict.fromkeys(sentence for report in reports for sentence in report["damaged"]):
        warn(f"skipped a damaged file: {sentence}")
    for (step, _), found in sorted(_joined([report["held"] for report in reports]).items(), reverse=True):
        try:
            return [Candidate(step, partial(Path, _complete(run, f"step-{step:08d}", found.missing(machines), group)))]
        except UserError as error:
            warn(f"skipped step-{step:08d} in memory: {error}")
    return []


@dataclass
class _Found:
    """What all machines hold of a checkpoint in memory."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of all its files."""
    holders: dict[str, list[int]] = field(default_factory=dict)
    """The ranks that have found a file good, one on each machine that holds it."""

    def missing(self, machines: Machines) -> list[Delivery]:
        """What brings to every machine the files that it lacks; raises `UserError` for a file that is nowhere."""
        deliveries = []
        for machine in range(machines.ranks // machines.each):
            lacking = [name for name in sorted(self.sizes) if machine not in map(machines.of, self.holders.get(name, ()))]
            for number, name in enumerate(lacking):
                if name not in self.holders:
                    raise UserError(f"no machine has a good {name} any more")
                source = self.holders[name][machine % len(self.holders[name])]
                deliveries.append(Delivery(name, self.sizes[name], source, machine * machines.each + number % machines.each))
        return deliveries


def _joined(reports: list[list[dict[str, Any]]]) -> dict[tuple[int, str], _Found]:
    """What all ranks hold, by the checkpoint's step and seal."""
    joined: dict[tuple[int, str], _Found] = {}
    for rank, held in enumerate(reports):
        for one in held:
            found = joined.setdefault((one["step"], one["seal"]), _Found())
            found.sizes |= one["sizes"]
            for name in one["good"]:
                found.holders.setdefault(name, []).append(rank)
    return joined


def _held(run: Path, machines: Machines) -> dict[str, Any]:
    """Of each checkpoint in this machine's memory the bytes of its files, and which are good of those that this rank looks after."""
    place, held, damaged = memory_folder(run), [], []
    for folder in checkpoint_folders(place) if place else ():
        try:
            checkpoint = open_checkpoint(folder)
        except UserError as error:
            damaged.append(str(error))
            continue
        sizes = {name: entry["bytes"] for name, entry in checkpoint.manifest["files"].items()}
        sizes |= {name: (folder / name).stat().st_size for name in SEAL}
        good = []
        for name in machines.share(sizes):
            try:
                checkpoint.verify([] if name in SEAL else [name])
                good.append(name)
            except UserError as error:
                damaged += [str(error)] if (folder / name).exists() else []
        seal = (folder / SEAL[1]).read_text("ascii")
        held.append({"step": checkpoint.step, "seal": seal, "sizes": sizes if machines.leads else {}, "good": good})
    return {"held": held, "damaged": damaged}


def _complete(run: Path, name: str, deliveries: list[Delivery], group: Group) -> Path:
    """The folder of a checkpoint in memory, with what it lacked; raises the same `UserError` on all ranks where that fails."""

    place = _noted(run)

    def make() -> None:
        with contextlib.suppress(OSError):
            place.mkdir(0o700, exist_ok=True)
        if memory_folder(run) is None:
            raise UserError(f"{place}: cannot be made on every machine, or belongs to another user")

    agree(group, make)
    folder = place / "checkpoints" / name
    deliver(folder, deliveries, group)
    came = [one.name for one in deliveries if one.target == group.rank and one.name not in SEAL]
    agree(group, lambda: open_checkpoint(folder).verify(came))
    return folder


def _noted(run: Path) -> Path:
    """The folder that a run's note names."""
    return PLACE / f"{_prefix(run)}-{(run / NOTE).read_text('ascii').strip()}"


def _remove_folders(run: Path) -> None:
    for folder in PLACE.glob(f"{_prefix(run)}-*"):
        if folder.lstat().st_uid == os.getuid():
            discard(folder)


def _prefix(run: Path) -> str:
    digest = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16]
    return f"teratron-{os.getuid()}-{digest}"
