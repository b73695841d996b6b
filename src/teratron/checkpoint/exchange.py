"""Weights from wherever they are: one door for `teratron convert`, `train.init` and `open_model`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from teratron.checkpoint.huggingface import is_huggingface, open_huggingface
from teratron.checkpoint.manifest import StoredTensor, whole
from teratron.checkpoint.megatron import is_megatron, open_megatron
from teratron.checkpoint.reader import Checkpoint, find_checkpoint
from teratron.checkpoint.source import Weights, tokenizer_in
from teratron.checkpoint.stream import Entry
from teratron.checkpoint.tensors import TensorFiles
from teratron.checkpoint.weights_file import open_weights_file
from teratron.config import UserError
from teratron.models import parts_of
from teratron.models.parts import check_parts

__all__ = ["Weights", "open_weights"]
_WEIGHT = "weight/"


def open_weights(source: Path) -> Weights:
    """The weights of a run (its newest good checkpoint), a checkpoint, a file of `teratron convert` or a Hugging Face folder.

    Only what describes them is read; the numbers when they are asked for. Raises `UserError` for anything else, and for weights
    that are damaged or of a model that cannot be expressed here.
    """
    if source.is_file():
        return open_weights_file(source)
    if is_huggingface(source):
        return open_huggingface(source)
    if is_megatron(source):
        return open_megatron(source)
    return _of_checkpoint(find_checkpoint(source))


def is_foreign(source: Path) -> bool:
    """Whether something is neither run nor checkpoint: a file, or a folder of another system."""
    return source.is_file() or is_huggingface(source) or is_megatron(source)


def load_entries(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Copy parts into a model, or each rank's pieces of them, one after the other."""
    by_name = {entry.name: entry for entry in entries}
    parts, parameters = parts_of(model), dict(model.named_parameters())
    check_parts(parts, {name: tuple(entry.shape) for name, entry in by_name.items()})
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()  # padding of the vocabulary stays zero
        for part in parts:
            part.of(parameters[part.parameter]).copy_(by_name[part.name].values()[part.box()])


def _of_checkpoint(checkpoint: Checkpoint) -> Weights:
    stored = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(_WEIGHT)]
    if not stored:
        raise UserError(f"{checkpoint.folder}: holds no weights; use another checkpoint")
    files = checkpoint.open()
    config, name = checkpoint.config(), f"{checkpoint.folder} (step {checkpoint.step:,})"
    parts = [_entry(files, tensor) for tensor in stored]
    return Weights(config.model, parts, tokenizer_in(checkpoint.folder / "tokenizer"), name, config, checkpoint.step)


def _entry(files: TensorFiles, tensor: StoredTensor) -> Entry:
    return Entry(tensor.name.removeprefix(_WEIGHT), tensor.dtype, tensor.shape, lambda: files.read(tensor.name, whole(tensor.shape)))
