"""Open a model for use: from a run, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from teratron.checkpoint.huggingface import is_huggingface, load_huggingface
from teratron.checkpoint.reader import Checkpoint, newest_checkpoint, open_checkpoint
from teratron.config import ModelConfig, UserError, nearest
from teratron.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from teratron.models import GPT, build_model, load_parts


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, ready to use."""

    model: GPT
    config: ModelConfig
    tokenizer: Tokenizer | None
    name: str
    """What was opened, for messages."""


def open_model(source: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> LoadedModel:
    """Open a run folder (its newest good checkpoint), a checkpoint folder or a Hugging Face folder.

    dtype: None = float32, or float64 for a run in fp64. Raises `UserError` for anything else.
    """
    folder = Path(source)
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()]) if folder.parent.is_dir() else ""
        raise UserError(f"{folder}: no such run, checkpoint or model folder{near}")
    if is_huggingface(folder):
        config, tensors = load_huggingface(folder)
        return LoadedModel(_fill(config, tensors, device, dtype or torch.float32), config, _tokenizer(folder), str(folder))
    checkpoint = _checkpoint(folder)
    run = checkpoint.config()
    native = torch.float64 if run.train.precision == "fp64" else torch.float32
    model = _fill(run.model, checkpoint.load("weight/"), device, dtype or native)
    return LoadedModel(model, run.model, _tokenizer(checkpoint.folder / "tokenizer"), f"{folder} (step {checkpoint.step:,})")


def _checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that a folder is, or the newest good one of a run."""
    if (folder / "manifest.json").is_file():
        checkpoint = open_checkpoint(folder)
        checkpoint.verify()
        return checkpoint
    newest = newest_checkpoint(folder, lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise UserError(f"{folder}: no checkpoint here; give a run folder of `teratron train`, a checkpoint, or a Hugging Face folder")
    return newest


def _fill(config: ModelConfig, tensors: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> GPT:
    model = build_model(config, device=device, dtype=dtype)
    load_parts(model, tensors)
    return model.eval()


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None when there is no file of one."""
    return load_tokenizer(folder) if folder.is_dir() and find_tokenizer(folder) else None
