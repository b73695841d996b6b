"""Reading checkpoints: find the newest good one, verify it, hand out tensors memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from teratron.checkpoint.format import FORMAT, VERSION, file_digest
from teratron.config import Config, UserError
from teratron.config.config import flatten


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

    def names(self, kind: str) -> list[str]:
        """Parts that have a tensor of a kind (`weight`, `moment1`, ...)."""
        return [name.partition("/")[2] for name in self.manifest["tensors"] if name.startswith(f"{kind}/")]

    def load(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind by part name, memory-mapped."""
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, Tensor] = {}
        try:
            for name, entry in self.manifest["tensors"].items():
                if name.startswith(f"{kind}/"):
                    (piece,) = entry["pieces"]
                    with safe_open(self.folder / piece["file"], framework="pt") as file:
                        tensors[name.partition("/")[2]] = file.get_tensor(piece["key"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{self.folder}: damaged checkpoint: {error}; use an earlier one") from None
        return tensors

    def verify(self) -> None:
        """Compare every file with its recorded size and SHA-256; raises `UserError` naming the first that differs."""
        for name, recorded in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path}: missing from the checkpoint; use an earlier one")
            if path.stat().st_size != recorded["bytes"]:
                raise UserError(f"{path}: {path.stat().st_size:,} bytes, {recorded['bytes']:,} were written; use an earlier checkpoint")
            if file_digest(path) != recorded["sha256"]:
                raise UserError(f"{path}: its contents changed since it was written (checksum differs); use an earlier checkpoint")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; raises `UserError` when it is incomplete, damaged or of another format."""
    try:
        text = (folder / "manifest.json").read_bytes()
        marker = (folder / "COMPLETE").read_text("ascii", "replace").strip()
    except OSError as error:
        raise UserError(f"{folder}: not a complete checkpoint ({Path(error.filename).name} is missing); use an earlier one") from None
    if hashlib.sha256(text).hexdigest() != marker:
        raise UserError(f"{folder}/manifest.json: does not match the COMPLETE marker, the checkpoint is damaged; use an earlier one")
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise UserError(f"{folder}: found format {found}, expected {FORMAT!r} version {VERSION}: use the release that wrote it")
    return Checkpoint(folder, manifest)


def checkpoint_folders(run: Path) -> list[Path]:
    """A run's checkpoint folders, newest first, good or not."""
    return sorted((run / "checkpoints").glob("step-[0-9]*"), reverse=True)


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies; damaged ones are named to `warn` and passed over.

    Raises `UserError` when there are checkpoints but none is good.
    """
    damaged = []
    for folder in checkpoint_folders(run):
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.verify()
        except UserError as error:
            damaged.append(str(error))
            warn(f"skipped a damaged checkpoint: {error}")
            continue
        return checkpoint
    if damaged:
        raise UserError(f"{run}: no good checkpoint is left ({len(damaged)} damaged); start again in another --run folder")
    return None
