"""Copies of a run's checkpoints in a second place (`checkpoint.copy_to`): a folder, or an object store that fsspec knows."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from teratron.checkpoint.format import SEAL, discard, publish
from teratron.checkpoint.reader import Candidate, Checkpoint, folder_step, open_checkpoint
from teratron.checkpoint.training import saved_state, surplus
from teratron.config import CheckpointConfig, UserError

_BLOCK = 2**24


class Copies:
    """A run's checkpoints below `checkpoint.copy_to`, in a folder of the run's name, each laid out as on disk.

    Making it raises `UserError` where the place cannot be used.
    """

    def __init__(self, config: CheckpointConfig, run: Path) -> None:
        self.run, self.config = run, config
        with self._refusing("cannot be used"):
            self.files, root = _file_system(config.copy_to)
            self.root = f"{root.rstrip('/')}/{run.resolve().name}"
            self.files.makedirs(self.root, exist_ok=True)
            self.steps()

    def steps(self) -> list[int]:
        """Of the checkpoints there, newest first, good or not."""
        try:
            names = [str(path).rstrip("/").rpartition("/")[2] for path in self.files.ls(self.root, detail=False)]
        except FileNotFoundError:  # an object store has no empty folders
            return []
        return sorted((step for name in names if (step := folder_step(name)) is not None), reverse=True)

    def candidates(self) -> list[Candidate]:
        """Those there, each fetched when it is asked for."""
        with self._refusing("cannot be read"):
            return [Candidate(step, partial(self._fetch, step)) for step in self.steps()]

    def copy(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint there, read it back, and remove those beyond `checkpoint.keep`; raises `UserError` where that fails."""
        place = f"{self.root}/{checkpoint.folder.name}"
        with self._refusing(f"{checkpoint.folder} cannot be copied"), contextlib.ExitStack() as stack:
            names = (*checkpoint.manifest["files"], *SEAL)
            # All opened at once: they stay readable when the folder is removed meanwhile.
            sources = {name: stack.enter_context((checkpoint.folder / name).open("rb")) for name in names}
            if checkpoint.step in self.steps():
                self.files.rm(place, recursive=True)
            for name, source in sources.items():
                self._copy_file(source, f"{place}/{name}")
            for step in surplus(self.steps(), saved_state(checkpoint), self.config):
                self.files.rm(f"{self.root}/step-{step:08d}", recursive=True)

    def _copy_file(self, source: BinaryIO, place: str) -> None:
        self.files.makedirs(place.rpartition("/")[0], exist_ok=True)
        written = hashlib.sha256()
        with self.files.open(place, "wb") as target:
            while block := source.read(_BLOCK):
                target.write(block)
                written.update(block)
            target.flush()
            with contextlib.suppress(io.UnsupportedOperation):
                os.fsync(target.fileno())
        with self.files.open(place, "rb") as copied:
            if hashlib.file_digest(copied, "sha256").digest() != written.digest():
                raise OSError(f"{place} reads back as something else")

    def _fetch(self, step: int) -> Path:
        """Copy a checkpoint from there into the run, where it takes the place of a damaged one."""
        folder = self.run / "checkpoints" / f"step-{step:08d}"
        begun = folder.with_name(f".{folder.name}.partial")
        place = f"{self.root}/{folder.name}"
        with self._refusing(f"{folder.name} cannot be fetched"):
            discard(begun)
            begun.mkdir(parents=True)
            for name in SEAL:
                self._fetch_file(place, begun, name)
            for name in open_checkpoint(begun).manifest["files"]:
                self._fetch_file(place, begun, name)
            publish(begun, folder)
        return folder

    def _fetch_file(self, place: str, folder: Path, name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with self.files.open(f"{place}/{name}", "rb") as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
            target.flush()
            os.fsync(target.fileno())

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each object store raises its own
            reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
            raise UserError(f"checkpoint.copy_to = {self.config.copy_to}: {what}: {reason}; correct it, or leave it out") from None


class _LocalFiles:
    """A plain folder, with the few methods of an fsspec file system that copies need."""

    def open(self, path: str, mode: str) -> Any:
        return open(path, mode)

    def ls(self, path: str, detail: bool) -> list[str]:
        return [str(item) for item in Path(path).iterdir()]

    def makedirs(self, path: str, exist_ok: bool) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def rm(self, path: str, recursive: bool) -> None:
        shutil.rmtree(path)


def _file_system(place: str) -> tuple[Any, str]:
    """The file system of a folder or URL, and the path in it."""
    if "://" not in place:
        return _LocalFiles(), os.path.abspath(place)
    try:
        import fsspec
    except ImportError:
        raise UserError(f"checkpoint.copy_to = {place}: needs the fsspec package: pip install fsspec, or give a folder") from None
    files, root = fsspec.core.url_to_fs(place)
    return files, str(root)
