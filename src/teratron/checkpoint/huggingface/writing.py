"""Export: a folder of config.json, safetensors files and a tokenizer, which `transformers` loads, written part by part.

.NAME.partial/     while it is written; what a killed export left is gone on with
  progress.json    what is being written, and the size and SHA-256 of each file that is complete
  model-00001-of-00003.safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.format import file_digest, publish, write_synced
from teratron.checkpoint.huggingface.describing import Described, describe
from teratron.checkpoint.huggingface.layouts import Link
from teratron.checkpoint.huggingface.reading import is_huggingface, open_huggingface
from teratron.checkpoint.huggingface.tokenizers import special_ids, write_tokenizer
from teratron.checkpoint.probe import Compared, compare
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry, write_safetensors
from teratron.checkpoint.weights_file import check_space
from teratron.config import UserError

PROGRESS = "progress.json"


def write_huggingface(weights: Weights, folder: Path, shard_size: int, overwrite: bool = False) -> Compared:
    """Write weights as a Hugging Face folder, which appears when it has been read back and compared with them.

    Args: shard_size: bytes of a file, more only where one tensor needs them. Raises `UserError` for a model that no class of theirs is,
    and where the folder exists or cannot be written.
    """
    _check_folder(folder, overwrite)
    described = describe(weights)
    shards = _shards(list(_tensors(weights, described)), shard_size)
    place = folder.with_name(f".{folder.name}.partial")
    try:
        place.mkdir(exist_ok=True)
        check_space(folder, sum(_bytes(entry) for shard in shards.values() for entry in shard))
        _write_shards(place, shards, _identity(weights, described, shards))
        _write_rest(place, weights, described, shards)
        compared = compare(weights, open_huggingface(place))
        (place / PROGRESS).unlink()
        publish(place, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}: free some space, or choose another place") from None
    return compared


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.parent.is_dir() or folder.is_file():
        raise UserError(f"{folder}: expected a folder to make, in a folder that exists")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder}: exists: choose another name, or add --overwrite")
        if not is_huggingface(folder):
            raise UserError(f"{folder}: holds no config.json: --overwrite replaces a Hugging Face folder alone; choose another name")


def _tensors(weights: Weights, described: Described) -> Iterator[Entry]:
    """Their tensors, made when they are asked for."""
    ours, bare = {entry.name: entry for entry in weights.parts}, described.architecture.forms[described.name].bare
    for link in described.links:
        parts, joined = [ours[name] for name in link.ours], _Joined()
        for place, (name, shape) in enumerate(zip(link.theirs, link.their_shapes(), strict=True)):
            stored = name.removeprefix(described.architecture.prefix) if bare else name
            yield Entry(stored, parts[0].dtype, shape, partial(joined.take, link, parts, place))
    for name, shape_of in described.architecture.blank.items():
        zeros, dtype = shape_of(weights.config), weights.parts[0].dtype
        for layer in range(weights.config.layers) if "#" in name else (0,):
            yield Entry(name.replace("#", str(layer)), dtype, zeros, partial(torch.zeros, zeros, dtype=dtype))


class _Joined:
    """Tensors that are made of the same parts, kept until the last is taken."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def take(self, link: Link, parts: Sequence[Entry], place: int) -> Tensor:
        made = self.made or link.join([entry.values() for entry in parts])
        self.made = made if place + 1 < len(link.theirs) else []
        return made[place].contiguous()


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _shards(entries: Sequence[Entry], size: int) -> dict[str, list[Entry]]:
    """Files of at most so many bytes, by name."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + _bytes(entry) > size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += _bytes(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _identity(weights: Weights, described: Described, shards: dict[str, list[Entry]]) -> str:
    """A digest of what is written: a killed export goes on only with the same."""
    tensors = {name: [[entry.name, str(entry.dtype), list(entry.shape)] for entry in shard] for name, shard in shards.items()}
    return hashlib.sha256(json.dumps([weights.name, described.content, tensors]).encode()).hexdigest()


def _write_shards(place: Path, shards: dict[str, list[Entry]], identity: str) -> None:
    done = _complete(place, identity)
    for name, entries in shards.items():
        if name not in done:
            done[name] = write_safetensors(place / name, entries, {"format": "pt"})
            write_synced(place / PROGRESS, json.dumps({"identity": identity, "files": done}).encode())


def _complete(place: Path, identity: str) -> dict[str, Any]:
    """The files that an export of the same has completed here, by name; all else is removed."""
    try:
        said = json.loads((place / PROGRESS).read_bytes())
        files = dict(said["files"]) if said["identity"] == identity else {}
        done = {name: kept for name, kept in files.items() if (place / name).is_file() and file_digest(place / name) == kept["sha256"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        done = {}
    for path in place.iterdir():
        if path.name not in (*done, PROGRESS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return done


def _write_rest(place: Path, weights: Weights, described: Described, shards: dict[str, list[Entry]]) -> None:
    """config.json, the index of several files, and the tokenizer."""
    dtype = str(weights.parts[0].dtype).removeprefix("torch.")
    ids = special_ids(weights)
    content = {**ids, **described.content, "torch_dtype": dtype, "transformers_version": "4.57.0"}
    _write_json(place / "config.json", content)
    if weights.config.head == "language" and weights.config.family != "encoder":
        _write_json(place / "generation_config.json", {"_from_model_config": True, **ids})
    if len(shards) > 1:
        places = {entry.name: name for name, shard in shards.items() for entry in shard}
        total = sum(_bytes(entry) for shard in shards.values() for entry in shard)
        _write_json(place / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    if weights.tokenizer is not None:
        write_tokenizer(weights.tokenizer, place, weights.config.positions)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_synced(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
