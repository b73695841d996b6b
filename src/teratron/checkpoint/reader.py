"""Reading checkpoints: find the newest good one, verify it, hand out tensors memory-mapped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from teratron.checkpoint.format import FORMAT, VERSION, file_digest
from teratron.config import Config, UserError
from teratron.config.config import flatten

USE_EARLIER = "use an earlier checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its manifest, checked against the complete marker."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def config(self) -> Config:
        """The config that made it."""
        return Config().override(flatten(self.manifest["config"], f"{self.folder}/manifest.json"))

    def load(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors whose name begins with a prefix, such as `weight/`, by the rest of their name, memory-mapped.

        Raises `UserError` when a file is missing or does not hold what the manifest says.
        """
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, Tensor] = {}
        files: dict[str, Any] = {}
        try:
            with ExitStack() as stack:
                for name, entry in self.manifest["tensors"].items():
                    if not name.startswith(prefix):
                        continue
                    (piece,) = entry["pieces"]
                    if piece["file"] not in files:
                        files[piece["file"]] = stack.enter_context(safe_open(self.folder / piece["file"], framework="pt"))
                    tensor = files[piece["file"]].get_tensor(piece["key"])
                    found, promised = [str(tensor.dtype), list(tensor.shape)], [f"torch.{entry['dtype']}", entry["shape"]]
                    if found != promised:
                        raise ValueError(f"{name} is {found}, the manifest says {promised}")
                    tensors[name.removeprefix(prefix)] = tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.folder}: damaged checkpoint: {error}; {USE_EARLIER}") from None
        return tensors

    def verify(self) -> None:
        """Compare every file with its recorded size and SHA-256; raises `UserError` naming the first that differs."""
        for name, recorded in self.manifest["files"].items():
            path = self.folder / name
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
        _check_manifest(manifest)
        _check_name(folder, manifest["step"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint's manifest: {type(error).__name__}: {error}; {USE_EARLIER}") from None
    return Checkpoint(folder, manifest)


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Refuse what no writer makes, by any of the errors that `open_checkpoint` turns into a sentence."""
    if not isinstance(manifest["step"], int) or not isinstance(manifest["config"], dict):
        raise TypeError("step is no integer or config no object")
    for name, recorded in manifest["files"].items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(f"file '{name}' lies outside the checkpoint")
        if not isinstance(recorded["bytes"], int) or not isinstance(recorded["sha256"], str):
            raise TypeError(f"size or checksum of file '{name}'")
    for name, entry in manifest["tensors"].items():
        shape, pieces = entry["shape"], entry["pieces"]
        if len(pieces) != 1 or pieces[0]["boxes"] != [{"offset": [0] * len(shape), "size": shape}]:
            raise ValueError(f"tensor '{name}' is cut into pieces, which this release does not read")
        if pieces[0]["file"] not in manifest["files"] or not isinstance(pieces[0]["key"], str):
            raise ValueError(f"tensor '{name}' lies in no file of the checkpoint")


def _check_name(folder: Path, step: int) -> None:
    """A renamed checkpoint would stand in the wrong place among a run's."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    if match and int(match[1]) != step:
        raise UserError(f"{folder}: holds step {step}, its name says {int(match[1])}: rename it to step-{step:08d}")


def checkpoint_folders(run: Path) -> list[Path]:
    """A run's checkpoint folders, newest first, good or not."""
    found = [(int(match[1]), p) for p in (run / "checkpoints").glob("step-*") if (match := re.fullmatch(r"step-(\d+)", p.name))]
    return [folder for _, folder in sorted(found, reverse=True)]


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies; damaged ones are named to `warn` and passed over.

    Raises `UserError` when there are checkpoints but none is good.
    """
    damaged = 0
    for folder in checkpoint_folders(run):
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.verify()
        except UserError as error:
            damaged += 1
            warn(f"skipped a damaged checkpoint: {error}")
            continue
        return checkpoint
    if damaged:
        raise UserError(f"{run}: no good checkpoint is left ({damaged} damaged); start again in another --run folder")
    return None
