"""One safetensors file of plain weights under their parts' names: what `teratron convert` makes by default."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from pathlib import Path
from typing import Any

from teratron.checkpoint.format import sync_folder
from teratron.checkpoint.probe import Compared, compare
from teratron.checkpoint.shards import Shards
from teratron.checkpoint.source import Weights, side_by_side
from teratron.checkpoint.stream import write_safetensors
from teratron.config import Config, UserError
from teratron.config.config import flatten

FORMAT, VERSION = "teratron-weights", "1"


def write_weights(weights: Weights, output: Path, overwrite: bool = False) -> Compared:
    """Write weights, whole and under their parts' names, into one safetensors file.

    Part by part, so that memory holds about the largest one; the file appears when it has been read back and compared. Its metadata are
    `format`, `version`, `step` and `config` (JSON).

    Raises `UserError` when the file exists (without overwrite) or cannot be written.
    """
    _check_output(output, overwrite)
    entries = side_by_side(weights.parts)
    config = json.dumps(tomllib.loads(weights.run_config().to_toml()))
    partial = output.with_name(f".{output.name}.partial")
    try:
        check_space(output, sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries))
        metadata = {"format": FORMAT, "version": VERSION, "step": str(weights.step), "config": config}
        write_safetensors(partial, entries, metadata)
        compared = compare(weights, open_weights_file(partial))
        partial.replace(output)
        sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}: free some space, or choose another place") from None
    finally:
        partial.unlink(missing_ok=True)
    return compared


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: expected a name that ends with .safetensors, such as {output.name}.safetensors")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output}: expected a file in a folder that exists")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists: choose another name, or add --overwrite")


def check_space(output: Path, needed: int) -> None:
    """Raise `UserError` unless so many bytes are free beside a file or folder."""
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(f"{output}: needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free: free some, or choose another place")


def open_weights_file(path: Path) -> Weights:
    """The weights in a file that `write_weights` made. Raises `UserError` for any other file."""
    shards = Shards([path], "make it again with `teratron convert`")
    config, step = _content(path, shards.metadata(path))
    return Weights(config.model, list(shards.entries()), None, f"{path} (step {step:,})", config, step)


def _content(path: Path, metadata: dict[str, str]) -> tuple[Config, int]:
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        found = f"format {metadata.get('format')!r} version {metadata.get('version')!r}"
        raise UserError(
            f"{path}: found {found}, expected {FORMAT!r} version {VERSION!r}: give a file of `teratron convert`, or a Hugging Face folder"
        )
    try:
        config: dict[str, Any] = json.loads(metadata["config"])
        return Config().override(flatten(config, str(path))), int(metadata["step"])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata hold no config and step ({error}); make it again with `teratron convert`") from None
