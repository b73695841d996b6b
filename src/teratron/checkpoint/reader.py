"""Reading checkpoints: find the newest good one, verify it, hand out tensors memory-mapped."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from teratron.checkpoint.format import FORMAT, VERSION, file_digest
from teratron.checkpoint.manifest import StoredTensor, read_tensors, whole
from teratron.checkpoint.tensors import USE_EARLIER, TensorFiles
from teratron.config import Config, UserError, nearest
from teratron.config.config import flatten
from teratron.parallel.boxes import Box


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its manifest, checked against the complete marker."""

    folder: Path
    manifest: dict[str, Any]
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def config(self) -> Config:
        """The config that made it."""
        return Config().override(flatten(self.manifest["config"], f"{self.folder}/manifest.json"))

    def open(self) -> TensorFiles:
        """Its tensor files, to read many regions; a context manager."""
        return TensorFiles(self.folder, self.tensors)

    def read(self, name: str, box: Box) -> Tensor:
        """A region of a tensor, such as a rank's share of `weight/blocks.0.attention.q.weight`, whatever pieces it was saved in.

        Memory-mapped where one piece holds it. Raises `UserError` for an unknown name or a damaged file, `ValueError` for a
        box outside the tensor.
        """
        if name not in self.tensors:
            raise UserError(f"{self.folder}: holds no {name}{nearest(name, self.tensors)}")
        with self.open() as files:
            return files.read(name, box)

    def load(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors whose name begins with a prefix, such as `weight/`, by the rest of their name; memory-mapped where whole.

        Raises `UserError` when a file is missing or does not hold what the manifest says.
        """
        found = [tensor for name, tensor in self.tensors.items() if name.startswith(prefix)]
        with self.open() as files:
            return {tensor.name.removeprefix(prefix): files.read(tensor.name, whole(tensor.shape)) for tensor in found}

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare every file, or those named, with its recorded size and SHA-256; raises `UserError` naming the first that differs."""
        for name in sorted(self.manifest["files"]) if names is None else names:
            path, recorded = self.folder / name, self.manifest["files"][name]
            try:
                if not path.is_file():
                    raise UserError(f"{path}: missing from the checkpoint; {USE_EARLIER}")
                if path.stat().st_size != recorded["bytes"]:
                    raise UserError(f"{path}: {path.stat().st_size:,} bytes, {recorded['bytes']:,} were written; {USE_EARLIER}")
                if file_digest(path) != recorded["sha256"]:
                    raise UserError(f"{path}: its contents changed since it was written (checksum differs); {USE_EARLIER}")
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}; {USE_EARLIER}") from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; raises `UserError` when it is incomplete, damaged or of another format."""
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        marker = (folder / "COMPLETE").read_text("ascii", "replace").strip()
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a complete checkpoint ({Path(error.filename).name} is missing); {USE_EARLIER}") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a checkpoint: {error.strerror or error}; {USE_EARLIER}") from None
    if hashlib.sha256(text).hexdigest() != marker:
        raise UserError(f"{path}: does not match the COMPLETE marker, the checkpoint is damaged; {USE_EARLIER}")
    try:
        manifest = json.loads(text)
        found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        if found != f"{FORMAT!r} version {VERSION}":
            raise UserError(f"{folder}: found format {found}, expected {FORMAT!r} version {VERSION}: use the release that wrote it")
        tensors = read_tensors(manifest)
        _check_name(folder, manifest["step"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint's manifest: {type(error).__name__}: {error}; {USE_EARLIER}") from None
    return Checkpoint(folder, manifest, tensors)


def _check_name(folder: Path, step: int) -> None:
    """A renamed checkpoint would stand in the wrong place among a run's."""
    named = folder_step(folder.name)
    if named not in (None, step):
        raise UserError(f"{folder}: holds step {step}, its name says {named}: rename it to step-{step:08d}")


class Candidate(NamedTuple):
    """A checkpoint of a run that may be good."""

    step: int
    fetch: Callable[[], Path]
    """Its folder; raises `UserError` where it cannot be had."""


def checkpoint_folders(run: Path) -> list[Path]:
    """A run's checkpoint folders, newest first, good or not."""
    found = [(step, p) for p in (run / "checkpoints").glob("step-*") if (step := folder_step(p.name)) is not None]
    return [folder for _, folder in sorted(found, reverse=True)]


def folder_step(name: str) -> int | None:
    """The step that a checkpoint folder's name says; None for another name."""
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match else None


def candidates(run: Path) -> list[Candidate]:
    """A folder's checkpoints, newest first, good or not."""
    return [Candidate(folder_step(folder.name) or 0, partial(Path, folder)) for folder in checkpoint_folders(run)]


def newest_checkpoint(run: Path, warn: Callable[[str], None], verify: bool = True, others: Iterable[Candidate] = ()) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies; damaged ones are named to `warn` and passed over.

    Args: verify: compare checksums, else look at the manifests only. others: where else some lie; of the same step the run's own goes
    first. Raises `UserError` when there are checkpoints but none is good.
    """
    damaged = 0
    for candidate in sorted((*candidates(run), *others), key=lambda found: -found.step):
        try:
            checkpoint = open_checkpoint(candidate.fetch())
            if verify:
                checkpoint.verify()
        except UserError as error:
            damaged += 1
            warn(f"skipped a damaged checkpoint: {error}")
            continue
        return checkpoint
    if damaged:
        raise UserError(f"{run}: no good checkpoint is left ({damaged} damaged); start again in another --run folder")
    return None


def find_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """The checkpoint that a folder is, or the newest good one of a run; what is passed over is named on standard error.

    verify: compare checksums, else look at the manifest only. Raises `UserError` when there is none.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file, expected a folder: give a checkpoint, or a run of `teratron train`")
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise UserError(f"{folder}: no such run, checkpoint or model{near}")
    if (folder / "manifest.json").is_file():
        checkpoint = open_checkpoint(folder)
        if verify:
            checkpoint.verify()
        return checkpoint
    newest = newest_checkpoint(folder, lambda text: print(text, file=sys.stderr), verify)
    if newest is None:
        raise UserError(f"{folder}: no checkpoint here; give a run folder of `teratron train`, a checkpoint, or a Hugging Face folder")
    return newest
