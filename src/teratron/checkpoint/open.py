"""Open a model for use: from a run, a checkpoint, a file of weights, or a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from teratron.checkpoint.agree import agree
from teratron.checkpoint.exchange import is_foreign, open_weights
from teratron.checkpoint.reader import Checkpoint, find_checkpoint, open_checkpoint
from teratron.checkpoint.source import load_entries, tokenizer_in, use_entries
from teratron.checkpoint.tensors import fill_pieces
from teratron.config import Config, ModelConfig, UserError
from teratron.data.tokenizer import Tokenizer
from teratron.models import GPT, EncoderDecoder, parts_of
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
    objective: str | None = None
    """What it has learnt, objective.name; None = unknown."""


def open_model(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, mesh: Mesh | None = None
) -> LoadedModel:
    """Open a run folder (its newest good checkpoint), a checkpoint folder, a file of `teratron convert` or a Hugging Face folder.

    Args: dtype: None = float32, or float64 for a run in fp64. mesh: cut the model over its tensor ranks; None = whole. A rank
    reads no more than it holds. Raises `UserError` for anything else.
    """
    path, mesh = Path(source), mesh or Mesh()
    if is_foreign(path):
        weights = open_weights(path)
        dtype = dtype or _native(weights.run)
        model = _cut(weights.config, dtype, mesh)
        types = {entry.dtype for entry in weights.parts} | {parameter.dtype for parameter in model.parameters()}
        if types == {dtype} and mesh.tensor.size == 1 and torch.device(device).type == "cpu":
            use_entries(model, weights.parts)
        else:
            materialise(model, device)
            load_entries(model, weights.parts)
        objective = weights.run.objective.name if weights.run is not None else None
        return LoadedModel(model, weights.config, weights.tokenizer, weights.name, objective)
    checkpoint = _same_checkpoint(path, mesh)
    run = checkpoint.config()
    model = _cut(run.model, dtype or _native(run), mesh)
    materialise(model, device)
    _fill(model, checkpoint)
    tokenizer, name = tokenizer_in(checkpoint.folder / "tokenizer"), f"{path} (step {checkpoint.step:,})"
    return LoadedModel(model, run.model, tokenizer, name, run.objective.name)


def _same_checkpoint(folder: Path, mesh: Mesh) -> Checkpoint:
    """What rank 0 finds and verifies, on every rank."""
    found: list[Checkpoint] = []

    def look() -> str:
        if mesh.rank == 0:
            found.append(find_checkpoint(folder))
        return str(found[0].folder) if found else ""

    name = agree(mesh.all, look)[0]
    return found[0] if found else open_checkpoint(Path(name))


def _native(config: Config | None) -> torch.dtype:
    return torch.float64 if config is not None and config.train.precision == "fp64" else torch.float32


def _cut(config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> GPT | EncoderDecoder:
    """A model, or this rank's share of it, without memory."""
    check_cut(config, mesh.tensor.size, f"--nproc {mesh.tensor.size}")
    model = cut_model(config, mesh, dtype=dtype)
    if not isinstance(model, (GPT, EncoderDecoder)) or not model.streams[""]:
        raise UserError(
            f"model.family = {config.family} does not continue text: choose a run or checkpoint of model.family = gpt or encoder_decoder"
        )
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
