"""Folders of `mp_rank_*`: one file of `torch.save` a tensor, pipeline and expert rank, of any release."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from teratron.checkpoint.megatron.pickles import Record
from teratron.checkpoint.megatron.rows import canonical
from teratron.checkpoint.megatron.torch_files import Stored, load_torch
from teratron.config import UserError

_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?$")
_FILES = ("model_optim_rng.pt", "model_rng.pt", "model.pt")


@dataclass(frozen=True)
class RankFile:
    """One rank's file."""

    tensor: int
    pipeline: int
    expert: int
    path: Path
    content: dict[str, Any] = field(repr=False)


def rank_folders(folder: Path) -> list[Path]:
    """The `mp_rank_*` of a folder."""
    return sorted(path for path in folder.glob("mp_rank_*") if _FOLDER.match(path.name))


def read_ranks(folder: Path) -> tuple[dict[str, Any], list[RankFile]]:
    """The attributes of `args`, and every rank's file, in the order of pipeline, expert and tensor ranks.

    Raises `UserError` for files that are missing, truncated, or would run something.
    """
    folders = rank_folders(folder)
    first = _load(folders[0])
    args = arguments_of(first, str(folders[0]))
    sizes = [_degree(args, f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert")]
    expected = dict(_names(*sizes))
    missing = [name for name in expected if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)}): args say tensor, pipeline and expert degrees of "
            f"{', '.join(map(str, sizes))}: copy all ranks' folders"
        )
    return args, [RankFile(*expected[name], folder / name, _load(folder / name)) for name in expected]


def arguments_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The attributes of a checkpoint's `args`; raises `UserError` without."""
    args = content.get("args")
    if not isinstance(args, Record) or not args.attributes:
        raise UserError(
            f"{name}: holds no args, expected those that trained the model: save it with a release of Megatron-LM that stores them"
        )
    return args.attributes


def _degree(args: Mapping[str, Any], name: str) -> int:
    legacy = {"tensor_model_parallel_size": "model_parallel_size"}
    return int(args.get(name, args.get(legacy.get(name, ""), 1)) or 1)


def _names(tensor: int, pipeline: int, expert: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The folders' names and their ranks."""
    for p in range(pipeline):
        for e in range(expert):
            for t in range(tensor):
                stage, of_experts = f"_{p:03d}" if pipeline > 1 else "", f"_{e:03d}" if expert > 1 else ""
                yield f"mp_rank_{t:02d}{stage}{of_experts}", (t, p, e)


def _load(folder: Path) -> dict[str, Any]:
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: holds no {_FILES[0]}: copy the folder again")
    content = load_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of model, args and more: copy it again")
    return content


Pick = Callable[[RankFile, str], Mapping[str, Any]]
"""What of a rank's file is meant, of the chunk of this name (`model`, or `model0`, `model1`, ... of a virtual pipeline)."""


def of_model(file: RankFile, chunk: str) -> Mapping[str, Any]:
    """The weights."""
    found = file.content.get(chunk)
    if not isinstance(found, dict):
        raise UserError(f"{file.path}: holds no '{chunk}': another kind of checkpoint?")
    return found


def chunks_of(file: RankFile) -> list[str]:
    """The names of the chunks of a rank's model."""
    found = sorted((name for name in file.content if re.fullmatch(r"model\d+", str(name))), key=lambda name: int(name[5:]))
    return found or ["model"]


def join_ranks(files: Sequence[RankFile], pick: Pick, experts: int) -> dict[str, list[Stored]]:
    """Every tensor by its canonical name with global layer and expert numbers: the shares of all tensor ranks, in their order.

    experts: of a layer, which expert ranks share.
    """
    joined: dict[str, list[Stored]] = {}
    per_rank = experts // (1 + max(file.expert for file in files)) if experts else 0
    offset = 0
    for chunk in chunks_of(files[0]):
        for stage in sorted({file.pipeline for file in files}):
            layers: set[int] = set()
            for file in (file for file in files if file.pipeline == stage):
                for name, stored in flat_tensors(pick(file, chunk)):
                    layer, global_name = _renumbered(canonical(name), offset, file.expert * per_rank)
                    layers |= {layer} - {-1}
                    if file.expert == 0 or re.search(r"\.experts\.\d+\.", global_name):
                        joined.setdefault(global_name, [])
                        if len(joined[global_name]) <= file.tensor:
                            joined[global_name].append(stored)
            offset += len(layers)
    return joined


def _renumbered(name: str, layers: int, experts: int) -> tuple[int, str]:
    """The local number of a tensor's layer, -1 = none, and its name with global numbers."""
    found = re.match(r"blocks\.layers\.(\d+)\.", name)
    if not found:
        return -1, name
    name = f"blocks.layers.{layers + int(found[1])}.{name[found.end() :]}"
    return int(found[1]), re.sub(r"\.experts\.(\d+)\.", lambda number: f".experts.{experts + int(number[1])}.", name)


def flat_tensors(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """The tensors of nested dicts by their names."""
    for key, value in tree.items():
        if isinstance(value, Stored):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from flat_tensors(value, f"{prefix}{key}.")


def interleaved(name: str, stored: Stored, version: float, head: int) -> Stored:
    """A piece of queries, keys and values in today's order, each head's in turn; before version 2 it was another. head: its features."""
    if version >= 2 or ".self_attention.linear_qkv." not in name:
        return stored

    def values() -> Tensor:
        found = stored.values()
        order = (3, -1, head) if version < 1 else (-1, head, 3)
        heads = found.unflatten(0, order)
        return (heads.transpose(0, 1) if version < 1 else heads.transpose(1, 2)).flatten(0, 2)

    return stored._replace(values=values)
