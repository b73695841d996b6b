"""One safetensors file of plain weights: what a checkpoint becomes when it is only to be used."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.format import sync_folder
from teratron.checkpoint.manifest import StoredTensor, whole
from teratron.checkpoint.reader import Checkpoint
from teratron.checkpoint.stream import Entry, write_safetensors
from teratron.checkpoint.tensors import TensorFiles
from teratron.config import Config, ModelConfig, UserError
from teratron.config.config import flatten
from teratron.models import build_model, parts_of
from teratron.models.parts import check_parts

FORMAT, VERSION = "teratron-weights", "1"
_WEIGHT = "weight/"
Change = Callable[[Config, Sequence[Entry]], tuple[Config, list[Entry]]]
"""Another model made from a run's config and weights."""


def write_weights(
    checkpoint: Checkpoint, output: Path, dtype: torch.dtype | None = None, overwrite: bool = False, change: Change | None = None
) -> int:
    """Write a checkpoint's weights, whole and under their parts' names, into one safetensors file; returns its bytes.

    Part by part, so that memory holds about the largest one; the file appears when it is complete. Its metadata are `format`,
    `version`, `step` and `config` (JSON).

    Args: dtype: None = as they are stored; change: write what it makes of them. Raises `UserError` when the file exists (without
    overwrite) or cannot be written, and for weights that are too large for the dtype.
    """
    _check_output(output, overwrite)
    weights = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(_WEIGHT)]
    if not weights:
        raise UserError(f"{checkpoint.folder}: holds no weights; use another checkpoint")
    config: Mapping[str, Any] = checkpoint.manifest["config"]
    partial = output.with_name(f".{output.name}.partial")
    try:
        with checkpoint.open() as files:
            entries = list(_entries(files, weights, dtype))
            if change is not None:
                changed, entries = change(checkpoint.config(), entries)
                config = tomllib.loads(changed.to_toml())
            _check_space(output, sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries))
            metadata = {"format": FORMAT, "version": VERSION, "step": str(checkpoint.step), "config": json.dumps(config)}
            written = write_safetensors(partial, entries, metadata)
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


LEARNT_OTHERWISE = (
    "seq_length", "max_positions", "vocab_multiple", "dropout", "attention_dropout", "init_std", "router_balance", "aux_loss", "bias_rate",
    "z_loss", "capacity",
)  # fmt: skip
"""Of `model.*`: what may differ between weights and a run that begins with them, as it does not change what they compute."""


def weights_for(path: Path, model: ModelConfig) -> Mapping[str, Tensor]:
    """The weights that a run of this model begins with, from a file of `teratron convert`, memory-mapped.

    Raises `UserError` for any other file, and where a key says that they belong to another model.
    """
    if not path.is_file():
        raise UserError(f"train.init = {path}: no such file: give one that `teratron convert RUN OUT.safetensors` made")
    config, _, tensors = read_weights(path)
    for field in fields(model):
        found, wanted = getattr(config.model, field.name), getattr(model, field.name)
        if found != wanted and field.name not in LEARNT_OTHERWISE:
            name = f"model.{field.name}"
            raise UserError(f"train.init = {path}: its weights have {name} = {found}, the run {wanted}: set --{name} {found}")
    check_parts(parts_of(build_model(model, device="meta")), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return tensors
