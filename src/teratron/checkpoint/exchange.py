"""Weights from wherever they are: one door for `teratron convert`, `train.init` and `open_model`."""

from __future__ import annotations

from pathlib import Path

from teratron.checkpoint.huggingface import is_huggingface, open_huggingface
from teratron.checkpoint.llama2c import open_llama2c
from teratron.checkpoint.manifest import StoredTensor, whole
from teratron.checkpoint.megatron import is_megatron, open_megatron
from teratron.checkpoint.reader import Checkpoint, find_checkpoint
from teratron.checkpoint.source import Weights, tokenizer_in
from teratron.checkpoint.stream import Entry
from teratron.checkpoint.tensors import TensorFiles
from teratron.checkpoint.weights_file import open_weights_file
from teratron.config import UserError

__all__ = ["Weights", "open_weights"]
_WEIGHT = "weight/"


def open_weights(source: Path) -> Weights:
    """The weights of a run (its newest good checkpoint), a checkpoint, a file of `teratron convert`, a Hugging Face folder, a file of
    llama2.c, or a folder of Megatron-LM.

    Only what describes them is read; the numbers when they are asked for. Raises `UserError` for anything else, and for weights
    that are damaged or of a model that cannot be expressed here.
    """
    if source.is_file():
        return open_llama2c(source) if source.suffix == ".bin" else open_weights_file(source)
    if is_huggingface(source):
        return open_huggingface(source)
    if is_megatron(source):
        return open_megatron(source)
    return _of_checkpoint(find_checkpoint(source))


def is_foreign(source: Path) -> bool:
    """Whether something is neither run nor checkpoint: a file, or a folder of another system."""
    return source.is_file() or is_huggingface(source) or is_megatron(source)


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
