"""The run directory: one config, one process at a time, and the rule of what may change when it goes on (contract C13)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from teratron.checkpoint import newest_checkpoint
from teratron.checkpoint.format import write_synced
from teratron.checkpoint.reader import checkpoint_folders
from teratron.config import Config, UserError, frozen_changes
from teratron.data.blend import parse_blend

FORKING = ".forking"
"""Stands in a run directory while it is being branched off and is not yet a run of its own."""


def lock(run: Path) -> TextIO:
    """Make the run directory and hold it for this process; raises `UserError` when another one has it or it is not writable."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--run {run}: cannot be written: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"--run {run}: another process is training here; wait for it, or choose another folder") from None
        raise UserError(f"--run {run}: cannot be locked: {error.strerror}; choose a folder on another disk") from None
    with contextlib.suppress(OSError):  # only `teratron watch` wants to know
        handle.truncate(0)
        handle.write(f"{socket.gethostname()} {os.getpid()}\n")
        handle.flush()
    return handle


def check_held(handle: TextIO | None, run: Path) -> None:
    """Raise `UserError` when the run directory is no longer the one that was locked."""
    try:
        held = handle is not None and os.path.samestat(os.fstat(handle.fileno()), (run / ".lock").stat())
    except OSError:
        held = False
    if not held:
        raise UserError(f"{run}: was removed or moved while it was being trained: its checkpoints cannot be written; start again")


def absolute_paths(config: Config) -> Config:
    """The same config with the paths of its data and copies made absolute, so that a run goes on from any working directory."""
    data = config.data
    paths: dict[str, Any] = {f"data.{name}": _absolute_blend(getattr(data, name)) for name in ("train", "valid")}
    tokenizer = data.tokenizer
    if tokenizer and tokenizer.partition(":")[0] not in ("bytes", "chars", "bpe", "wordpiece"):
        tokenizer = os.path.abspath(tokenizer)
    copies = config.checkpoint.copy_to
    if copies and "://" not in copies:
        paths["checkpoint.copy_to"] = os.path.abspath(copies)
    if data.examples:
        paths["data.examples"] = os.path.abspath(data.examples)
    if config.train.init:
        paths["train.init"] = os.path.abspath(config.train.init)
    if config.parallel.offload_folder:
        paths["parallel.offload_folder"] = os.path.abspath(config.parallel.offload_folder)
    tasks = (item.partition(":") for item in config.train.eval_tasks)
    paths["train.eval_tasks"] = tuple(f"{task}:{os.path.abspath(file)}" for task, _, file in tasks)
    return config.override({"data.text": tuple(map(os.path.abspath, data.text)), **paths, "data.tokenizer": tokenizer})


def _absolute_blend(items: tuple[str, ...]) -> tuple[str, ...]:
    weighted = bool(items) and parse_blend(items)[0][0] is not None
    return tuple(item if weighted and place % 2 == 0 else os.path.abspath(item) for place, item in enumerate(items))


def run_config(run: Path) -> Config:
    """The config that a run holds: its config.toml, else that of its newest checkpoint. Raises `UserError` where there is none."""
    if has_config(run):
        return Config.load(run)
    checkpoint = newest_checkpoint(run, print, verify=False)
    if checkpoint is None:
        raise UserError(f"--run {run} holds neither a config.toml nor a checkpoint: give a preset or a TOML file to start a run there")
    return checkpoint.config()


def has_config(run: Path) -> bool:
    """Whether there is a config.toml; one without a word was emptied, as by a full disk, and is none."""
    path = run / "config.toml"
    return path.is_file() and path.stat().st_size > 0


def continue_config(run: Path, config: Config, say: Callable[[str], None]) -> Config:
    """The config of a run that goes on: refuses keys that may not change, fills what the run had resolved.

    A fresh folder, or one that is being branched off, returns `config` as it is.
    """
    if not has_config(run):
        if (run / FORKING).is_file() or not checkpoint_folders(run):
            return config
        say(f"{run / 'config.toml'} is missing or empty: made again from the newest checkpoint")
    saved = run_config(run)
    if config.model.vocab_size == 0:
        config = config.override({"model.vocab_size": saved.model.vocab_size})
    refuse_changes(run, "run", frozen_changes(saved, config), "use that value, another --run folder, or --fork NEWDIR to branch off")
    return config


def refuse_changes(
    folder: Path, what: str, changes: Sequence[tuple[str, Any, Any]], instead: str = "use that value, or another --run folder"
) -> None:
    """Raise `UserError` if a folder holds something begun otherwise. changes: (name, value then, value now)."""
    if changes:
        name, old, new = changes[0]
        more = f" (and {len(changes) - 1} more keys)" if len(changes) > 1 else ""
        raise UserError(f"--run {folder} holds a {what} with {name} = {old!r}, now {new!r}{more}: {instead}")


def write_config(run: Path, config: Config) -> None:
    """Save the effective config, atomically; from now on the directory holds a run."""
    partial = run / ".config.toml.partial"
    try:
        write_synced(partial, config.to_toml().encode())
        partial.replace(run / "config.toml")
        (run / FORKING).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{run}/config.toml: cannot be written: {error.strerror}; free space or choose another --run folder") from None


def fork(old: Path, new: Path) -> None:
    """Copy the newest checkpoint and the tokenizer of run `old` into `new`, which its first `write_config` makes a run of its own.

    A folder that is one already is left as it is, so that the same command goes on there; a copy cut short is made again.
    """
    if (new / "config.toml").is_file():
        return
    if (new / "checkpoints").exists() and not (new / FORKING).is_file():
        raise UserError(f"--fork {new}: holds checkpoints of something else; choose another folder")
    checkpoint = newest_checkpoint(old, print)
    if checkpoint is None:
        raise UserError(f"--fork {new}: {old} has no checkpoint to branch off; train it first")
    try:
        (new / FORKING).touch()
        for name in ("checkpoints", "tokenizer"):
            shutil.rmtree(new / name, ignore_errors=True)
        shutil.copytree(checkpoint.folder, new / "checkpoints" / checkpoint.folder.name)
        if (checkpoint.folder / "tokenizer").is_dir():
            shutil.copytree(checkpoint.folder / "tokenizer", new / "tokenizer")
    except OSError as error:
        reason = error.strerror or error.args[0][0][-1]  # a tree's copy gives the reason of each file
        raise UserError(f"--fork {new}: cannot copy {checkpoint.folder}: {reason}; run the same command again") from None
