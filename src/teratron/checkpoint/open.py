"""Open a model for use: from a run, a checkpoint, a file of weights, or a Hugging Face folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from teratron.checkpoint.agree import agree
from teratron.checkpoint.huggingface import is_huggingface, load_huggingface
from teratron.checkpoint.reader import Checkpoint, newest_checkpoint, open_checkpoint
from teratron.checkpoint.tensors import fill_pieces
from teratron.checkpoint.weights import read_weights
from teratron.config import Config, ModelConfig, UserError, nearest
from teratron.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from teratron.models import GPT, EncoderDecoder, load_parts, parts_of
from teratron.models.parts import check_parts
from teratron.parallel.apply import cut_model, materialise
from teratron.parallel.boxes import Box, Piece
from teratron.parallel.mesh import Mesh, check_cut


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, ready to use."""

    model: GPT | EncoderDecoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    name: str
    """What was opened, for messages."""


def open_model(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, mesh: Mesh | None = None
) -> LoadedModel:
    """Open a run folder (its newest good checkpoint), a checkpoint folder, a file of `teratron convert` or a Hugging Face folder.

    Args: dtype: None = float32, or float64 for a run in fp64. mesh: cut the model over its tensor ranks; None = whole. A rank
    reads no more than it holds. Raises `UserError` for anything else.
    """
    path, mesh = Path(source), mesh or Mesh()
    if path.is_file():
        run, step, tensors = read_weights(path)
        model = _empty(run.model, device, dtype or _native(run), mesh)
        load_parts(model, tensors)
        return LoadedModel(model, run.model, None, f"{path} (step {step:,})")
    if path.is_dir() and is_huggingface(path):
        config, tensors = load_huggingface(path)
        model = _empty(config, device, dtype or torch.float32, mesh)
        load_parts(model, tensors)
        return LoadedModel(model, config, _tokenizer(path), str(path))
    checkpoint = _same_checkpoint(path, mesh)
    run = checkpoint.config()
    model = _empty(run.model, device, dtype or _native(run), mesh)
    _fill(model, checkpoint)
    return LoadedModel(model, run.model, _tokenizer(checkpoint.folder / "tokenizer"), f"{path} (step {checkpoint.step:,})")


def find_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """The checkpoint that a folder is, or the newest good one of a run; what is passed over is named on standard error.

    verify: compare checksums, else look at the manifest only. Raises `UserError` when there is none.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file, expected a folder: give a checkpoint, or a run of `teratron train`")
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise UserError(f"{folder}: no such run, checkpoint or model{near}")
    if (folder / "manifest.json").is_file():
        checkpoint = open_checkpoint(folder)
        if verify:
            checkpoint.verify()
        return checkpoint
    newest = newest_checkpoint(folder, lambda text: print(text, file=sys.stderr), verify)
    if newest is None:
        raise UserError(f"{folder}: no checkpoint here; give a run folder of `teratron train`, a checkpoint, or a Hugging Face folder")
    return newest


def _same_checkpoint(folder: Path, mesh: Mesh) -> Checkpoint:
    """What rank 0 finds and verifies, on every rank."""
    found: list[Checkpoint] = []

    def look() -> str:
        if mesh.rank == 0:
            found.append(find_checkpoint(folder))
        return str(found[0].folder) if found else ""

    name = agree(mesh.all, look)[0]
    return found[0] if found else open_checkpoint(Path(name))


def _native(config: Config) -> torch.dtype:
    return torch.float64 if config.train.precision == "fp64" else torch.float32


def _empty(config: ModelConfig, device: str | torch.device, dtype: torch.dtype, mesh: Mesh) -> GPT | EncoderDecoder:
    """A model, or this rank's share of it, filled with zeros."""
    check_cut(config, mesh.tensor.size, f"--nproc {mesh.tensor.size}")
    model = cut_model(config, mesh, dtype=dtype)
    if not isinstance(model, (GPT, EncoderDecoder)) or not model.streams[""]:
        raise UserError(
            f"model.family = {config.family} does not continue text: choose a run or checkpoint of model.family = gpt or encoder_decoder"
        )
    materialise(model, device)
    return model.eval()


def _fill(model: GPT | EncoderDecoder, checkpoint: Checkpoint) -> None:
    """Read the weights, however they were cut."""
    prefix, parts = "weight/", parts_of(model)
    stored = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)}
    check_parts(parts, {name: tuple(tensor.shape) for name, tensor in stored.items()})
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    pieces = [
        Piece(f"{prefix}{part.name}", part.shape, (Box(part.offset, part.size),), part.of(parameters[part.parameter]).view(-1))
        for part in parts
    ]
    fill_pieces(checkpoint.folder, checkpoint.tensors, pieces)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None when there is no file of one."""
    return load_tokenizer(folder) if folder.is_dir() and find_tokenizer(folder) else None
