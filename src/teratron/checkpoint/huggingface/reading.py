"""Import: a folder of `config.json` and safetensors files becomes a model's config and its parts, read when they are asked for.

Pickles (`pytorch_model.bin`) are read without being run. What the model here cannot express is refused, never approximated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.huggingface.decoders import DECODERS
from teratron.checkpoint.huggingface.deepseek import DEEPSEEKS
from teratron.checkpoint.huggingface.encoder_decoders import ENCODER_DECODERS
from teratron.checkpoint.huggingface.encoders import ENCODERS
from teratron.checkpoint.huggingface.gemmas import GEMMAS
from teratron.checkpoint.huggingface.layouts import Link
from teratron.checkpoint.huggingface.llamas import LLAMAS
from teratron.checkpoint.huggingface.settings import Architecture, Form, Settings
from teratron.checkpoint.megatron.torch_files import Stored, load_torch
from teratron.checkpoint.shards import Shards
from teratron.checkpoint.source import Weights, tokenizer_in
from teratron.checkpoint.stream import Entry
from teratron.config import ModelConfig, UserError

ARCHITECTURES: tuple[Architecture, ...] = (*LLAMAS, *GEMMAS, *DEEPSEEKS, *DECODERS, *ENCODERS, *ENCODER_DECODERS)
_BUFFERS = re.compile(r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq|embeddings\.position_ids|\.attention\.(bias|masked_bias))")
"""Constants that files hold among the weights: causal masks, rotary frequencies, places."""
_TABLES = re.compile(r"(model\.)?(en|de)coder\.embed_tokens\.weight|model\.shared\.weight")
"""Copies of an encoder-decoder's one table of tokens."""


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model (supported or not): it has a `config.json`."""
    return (folder / "config.json").is_file()


def open_huggingface(folder: Path) -> Weights:
    """The weights in a folder of an architecture in `ARCHITECTURES`, in the file's dtype, and its tokenizer.

    Dropout is a choice of training, not of the weights: it is 0 in the config. Raises `UserError` for other architectures, features that
    the model here lacks, missing, unexpected, mis-shaped or quantised tensors, and a tokenizer with more ids than the model.
    """
    settings = Settings(read_json(folder / "config.json"))
    try:
        architecture, form, config = read_config(settings)
        found = architecture.links(config, form)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    stored = _Stored(folder, architecture)
    parts = [entry for link in found for entry in stored.entries(link)]
    stored.check_spare(config)
    tokenizer = tokenizer_in(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the model 'vocab_size' = {config.vocab_size}: they do not belong "
            "together; copy the tokenizer that the model was trained with"
        )
    return Weights(config, parts, tokenizer, str(folder))


def read_config(settings: Settings) -> tuple[Architecture, Form, ModelConfig]:
    """Which class a config.json describes, and its model. Raises `UserError` that names the key."""
    try:
        architecture, form = _architecture(settings)
        return architecture, form, architecture.config(settings, form)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"holds a value of a wrong type ({error}); download it again") from None


class _Stored:
    """The tensors of a folder, with or without the architecture's prefix before their names."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder, self.architecture = folder, architecture
        self.shards = _tensors(folder)
        self.names = {name.removeprefix(architecture.prefix): name for name in self.shards.names()}

    def entries(self, link: Link) -> list[Entry]:
        """The parts of a link; refuses what is missing, of a wrong shape, or not in plain floating point."""
        theirs = [self._entry(name, shape) for name, shape in zip(link.theirs, link.their_shapes(), strict=True)]
        if len(link.ours) == 1:
            return [Entry(link.ours[0], theirs[0].dtype, link.shapes[0], partial(_split, link, theirs, 0))]
        pairs = enumerate(zip(link.ours, link.shapes, strict=True))
        return [Entry(name, theirs[0].dtype, shape, partial(_split, link, theirs, place)) for place, (name, shape) in pairs]

    def _entry(self, name: str, shape: torch.Size) -> Entry:
        bare = name.removeprefix(self.architecture.prefix)
        if bare not in self.names:
            raise UserError(f"{self.folder}: {name} is missing from the weights; download the folder again")
        entry = self.shards.entry(self.names.pop(bare))
        if list(entry.shape) != list(shape):
            raise UserError(f"{self.folder}: {name} has shape {list(entry.shape)}, expected {list(shape)} from config.json")
        if not entry.dtype.is_floating_point:
            raise UserError(
                f"{self.folder}: {name} holds {entry.dtype}, expected float64|float32|bfloat16|float16: use unquantised weights"
            )
        return entry

    def check_spare(self, config: ModelConfig) -> None:
        """Refuse tensors that are no part of the model, nor copies or constants."""
        architecture = self.architecture
        blank = [re.escape(name.removeprefix(architecture.prefix)).replace(r"\#", r"\d+") for name in architecture.blank]
        known = [*map(re.escape, architecture.copies if config.tie_embeddings else ()), *blank]
        spare = [name for name in self.names if not _BUFFERS.fullmatch(name) and not any(re.fullmatch(one, name) for one in known)]
        if config.family == "encoder_decoder":
            spare = [name for name in spare if not _TABLES.fullmatch(name)]
        if spare:
            more = f" (and {len(spare) - 1} more)" if len(spare) > 1 else ""
            raise UserError(f"{self.folder}: the weights hold {spare[0]}{more}, which config.json does not describe: another architecture?")


def _split(link: Link, theirs: list[Entry], place: int) -> Tensor:
    return link.split([entry.values() for entry in theirs])[place]


class _Pickles:
    """The tensors of files of `torch.save` by name; their pickles are read, never run."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.stored: dict[str, Stored] = {}
        for path in files:
            content = load_torch(path)
            if not isinstance(content, dict) or not all(isinstance(value, Stored) for value in content.values()):
                raise UserError(f"{path}: found {type(content).__name__}, expected tensors by name; download it again")
            self.stored |= content

    def names(self) -> list[str]:
        return list(self.stored)

    def entry(self, name: str) -> Entry:
        return Entry(name, *self.stored[name])


def _tensors(folder: Path) -> Shards | _Pickles:
    """Of `model.safetensors`, or else of `pytorch_model.bin`; or of the files that an index of that name lists."""
    readers: dict[str, Callable[[Sequence[Path]], Shards | _Pickles]] = {
        "model.safetensors": partial(Shards, advice="download it again"),
        "pytorch_model.bin": _Pickles,
    }
    for name, reader in readers.items():
        if (folder / name).is_file():
            return reader([folder / name])
        if (folder / f"{name}.index.json").is_file():
            return reader(_listed(folder / f"{name}.index.json"))
    raise UserError(f"{folder}: no model.safetensors or model.safetensors.index.json; download the weights")


def _listed(index: Path) -> list[Path]:
    """The files that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: 'weight_map' = {places!r}: expected a table of tensor names and files; download it again")
    names = sorted({str(name) for name in places.values()})
    absent = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{index}: names {absent[0]}, which is not in the folder ({len(absent)} of {len(names)} missing); download it")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises `UserError` for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a JSON {type(content).__name__}, expected an object; download it again")
    return content


def _architecture(settings: Settings) -> tuple[Architecture, Form]:
    """By `architectures`, or by `model_type` where a file has none."""
    by_type = {entry.model_type: next(iter(entry.forms)) for entry in ARCHITECTURES}
    model_type = settings.get("model_type", "none")
    (name, *_) = settings.get("architectures", []) or [by_type.get(model_type, model_type)]
    for architecture in ARCHITECTURES:
        if name in architecture.forms:
            return architecture, architecture.forms[name]
    supported = ", ".join(name for architecture in ARCHITECTURES for name in architecture.forms)
    raise UserError(f"architecture '{name}' is not supported; supported: {supported}")
