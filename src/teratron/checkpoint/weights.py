"""One safetensors file of plain weights: what a checkpoint becomes when it is only to be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.format import sync_folder
from teratron.checkpoint.manifest import StoredTensor, whole
from teratron.checkpoint.reader import Checkpoint
from teratron.checkpoint.stream import Entry, write_safetensors
from teratron.checkpoint.tensors import TensorFiles
from teratron.config import Config, UserError
from teratron.config.config import flatten

FORMAT, VERSION = "teratron-weights", "1"
_WEIGHT = "weight/"


def write_weights(checkpoint: Checkpoint, output: Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> int:
    """Write a checkpoint's weights, whole and under their parts' names, into one safetensors file; returns its bytes.

    Part by part, so that memory holds about the largest one; the file appears when it is complete. Its metadata are `format`,
    `version`, `step` and `config` (JSON).

    Args: dtype: None = as they are stored. Raises `UserError` when the file exists (without overwrite) or cannot be written, and
    for weights that are too large for the dtype.
    """
    _check_output(output, overwrite)
    weights = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(_WEIGHT)]
    if not weights:
        raise UserError(f"{checkpoint.folder}: holds no weights; use another checkpoint")
    config = json.dumps(checkpoint.manifest["config"])
    metadata = {"format": FORMAT, "version": VERSION, "step": str(checkpoint.step), "config": config}
    partial = output.with_name(f".{output.name}.partial")
    try:
        _check_space(output, sum(tensor.count * (dtype or tensor.dtype).itemsize for tensor in weights))
        with checkpoint.open() as files:
            written = write_safetensors(partial, list(_entries(files, weights, dtype)), metadata)
        partial.replace(output)
        sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}: free some space, or choose another place") from None
    finally:
        partial.unlink(missing_ok=True)
    return int(written["bytes"])


def _entries(files: TensorFiles, weights: list[StoredTensor], dtype: torch.dtype | None) -> Iterator[Entry]:
    for tensor in weights:
        target = dtype or tensor.dtype

        def values(tensor: StoredTensor = tensor, target: torch.dtype = target) -> Tensor:
            found = files.read(tensor.name, whole(tensor.shape))
            _check_range(tensor.name, found, target)
            return found

        yield Entry(tensor.name.removeprefix(_WEIGHT), target, tensor.shape, values)


def _check_range(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Refuse numbers that would become infinite."""
    limit = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max <= limit or not values.numel():
        return
    largest = max(abs(float(bound)) for bound in torch.aminmax(values))
    if limit < largest < float("inf"):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} holds {largest:.4g}, more than the {limit:.4g} of {kind}: choose bf16, or leave --dtype out")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: expected a name that ends with .safetensors, such as {output.name}.safetensors")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output}: expected a file in a folder that exists")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists: choose another name, or add --overwrite")


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(f"{output}: needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free: free some, or choose another place")


def read_weights(path: Path) -> tuple[Config, int, dict[str, Tensor]]:
    """The config, the step and the weights by part name, memory-mapped, of a file that `write_weights` made.

    Raises `UserError` for any other file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            config, step = _content(path, metadata)
            return config, step, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); make it again with `teratron convert`") from None


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
