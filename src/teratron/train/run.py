"""The run directory: one config, one process at a time, and the rule of what may change when it goes on (contract C13)."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import TextIO

from teratron.checkpoint import newest_checkpoint
from teratron.config import Config, UserError, frozen_changes


def lock(run: Path) -> TextIO:
    """Make the run directory and hold it for this process; raises `UserError` when another one has it or it is not writable."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--run {run}: cannot be written: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--run {run}: another process is training here; wait for it, or choose another folder") from None
    return handle


def absolute_paths(config: Config) -> Config:
    """The same config with the paths that exist made absolute, so that a run goes on from any working directory."""

    def absolute(item: str) -> str:
        there = os.path.exists(item) or os.path.exists(f"{item}.idx")
        return os.path.abspath(item) if there else item

    data = config.data
    tokenizer = data.tokenizer if data.tokenizer in ("bytes", "chars") else absolute(data.tokenizer)
    lists = {f"data.{name}": tuple(map(absolute, getattr(data, name))) for name in ("text", "train", "valid")}
    return config.override({**lists, "data.tokenizer": tokenizer})


def continue_config(run: Path, config: Config) -> Config:
    """The config of a run that goes on: refuses keys that may not change, fills what the run had resolved.

    A fresh folder returns `config` as it is.
    """
    path = run / "config.toml"
    if not path.is_file():
        if (run / "checkpoints").is_dir():
            raise UserError(f"--run {run} has checkpoints but no config.toml: choose another folder")
        return config
    saved = Config.load(path)
    if config.model.vocab_size == 0:
        config = config.override({"model.vocab_size": saved.model.vocab_size})
    changes = frozen_changes(saved, config)
    if changes:
        name, old, new = changes[0]
        more = f" (and {len(changes) - 1} more keys)" if len(changes) > 1 else ""
        raise UserError(
            f"--run {run} holds a run with {name} = {old!r}, now {new!r}{more}: use that value, another --run folder, or --fork NEWDIR to branch off"
        )
    return config


def write_config(run: Path, config: Config) -> None:
    """Save the effective config, atomically."""
    partial = run / ".config.toml.partial"
    partial.write_text(config.to_toml(), "utf-8")
    partial.replace(run / "config.toml")


def fork(old: Path, new: Path, config: Config) -> None:
    """Start `new` from the newest checkpoint and the tokenizer of `old`, with another config.

    A folder that was forked before is left as it is, so the same command goes on there.
    """
    if (new / "checkpoints").is_dir():
        return
    checkpoint = newest_checkpoint(old, print)
    if checkpoint is None:
        raise UserError(f"--fork {new}: {old} has no checkpoint to branch off; train it first")
    partial = new / ".fork.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(checkpoint.folder, partial / checkpoint.folder.name)
    if (checkpoint.folder / "tokenizer").is_dir():
        shutil.copytree(checkpoint.folder / "tokenizer", new / "tokenizer", dirs_exist_ok=True)
    vocab = config.model.vocab_size or checkpoint.config().model.vocab_size
    write_config(new, config.override({"model.vocab_size": vocab}))
    partial.rename(new / "checkpoints")
