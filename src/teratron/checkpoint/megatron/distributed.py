"""Directories of `torch_dist`: torch.distributed.checkpoint's files, read without running its pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.megatron.pickles import Record, read_pickle
from teratron.checkpoint.megatron.torch_files import MappedFile, Stored, dtype_named, load_region, load_torch
from teratron.config import UserError
from teratron.parallel.boxes import Box

_LAYERS = re.compile(r"^((?:.*\.)?(?:decoder|encoder)\.layers\.)(?!\d+\.)(.*)$")
"""Names of tensors that are stacked over layers."""
_EXPERTS = re.compile(r"^(.*\.mlp\.experts\.)experts\.(linear_fc[12]\..*)$")
"""Names of tensors that are stacked over experts."""


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor, and where its bytes lie."""

    box: Box
    file: MappedFile
    start: int
    size: int

    def read(self) -> Tensor:
        found = load_region(self.file, self.start, self.size)
        if not isinstance(found, Stored) or found.shape != self.box.size:
            raise UserError(f"{self.file.path}: byte {self.start:,} holds no tensor of shape {list(self.box.size)}: copy the folder again")
        return found.values()


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the directory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]

    def read(self, box: Box) -> Tensor:
        """A region of it; the numbers of a single chunk are memory-mapped."""
        shared = [(chunk, met) for chunk in self.chunks if (met := chunk.box.meet(box)) is not None]
        if sum(met.count for _, met in shared) != box.count:
            raise UserError(f"{self.name}: parts of it are missing from the checkpoint: copy the folder again")
        found = [(met, chunk.read()[met.inside(chunk.box).slices()]) for chunk, met in shared]
        if len(found) == 1:
            return found[0][1]
        out = torch.empty(box.size, dtype=self.dtype)
        for met, values in found:
            out[met.inside(box).slices()] = values
        return out

    def stored(self, *index: int) -> Stored:
        """Itself, or what has this index in its first dimensions."""
        rest = self.shape[len(index) :]
        box = Box((*index, *(0,) * len(rest)), ((1,) * len(index)) + rest)
        return Stored(self.dtype, rest, lambda: self.read(box).reshape(rest))


def is_distributed(folder: Path) -> bool:
    """Whether a folder is of `torch_dist`, or another format of megatron-core's dist_checkpointing."""
    return (folder / "metadata.json").is_file()


def read_distributed(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """What is common to all ranks (`args`, `iteration`, ...), and every tensor by its name, layer by layer and expert by expert.

    Raises `UserError` for another backend, a damaged or incomplete folder.
    """
    try:
        backend = json.loads((folder / "metadata.json").read_text("utf-8")).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'metadata.json'}: not a readable JSON object ({error}): copy the folder again") from None
    if backend != "torch_dist":
        raise UserError(f"{folder}: sharded_backend = {backend!r}, expected 'torch_dist': save with --ckpt-format torch_dist")
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = read_pickle(file, str(path))
        tensors, common = _tensors(folder, metadata)
    except FileNotFoundError:
        raise UserError(f"{path}: missing from the checkpoint: copy the folder again, hidden files too") from None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not the metadata of torch.distributed.checkpoint ({error!r}): copy the folder again") from None
    if common is None:
        common = load_torch(folder / "common.pt")
    if not isinstance(common, dict):
        raise UserError(f"{folder}: what is common to all ranks is a {type(common).__name__}, expected a dict: copy the folder again")
    return common, {name: stored for tensor in tensors for name, stored in _unstacked(tensor).items()}


def _tensors(folder: Path, metadata: Record) -> tuple[list[_Tensor], Any]:
    """The tensors, and the common state where it lies among them (megatron-core 0.19 and later)."""
    fields = metadata.attributes
    places = {_index(key): value.attributes for key, value in fields["storage_data"].items()}
    files: dict[str, MappedFile] = {}

    def chunk(name: str, box: Box) -> _Chunk:
        place = places[name, box.offset]
        file = str(place["relative_path"])
        if place.get("transform_descriptors"):
            raise UserError(f"{folder}: {name} is compressed, which is not read: save it without extensions")
        if len(PurePosixPath(file).parts) != 1:
            raise UserError(f"{folder}: {name} lies in {file}, outside of the checkpoint: get it from a source that you trust")
        if file not in files:
            files[file] = MappedFile(folder / file)
        files[file].data(place["offset"], place["length"])  # refused now where the file is truncated
        return _Chunk(box, files[file], place["offset"], place["length"])

    tensors, common = [], None
    for name, entry in fields["state_dict_metadata"].items():
        about = entry.attributes
        if "chunks" in about:
            boxes = [Box(tuple(found["offsets"]), tuple(found["sizes"])) for found in (one.attributes for one in about["chunks"])]
            dtype = dtype_named(_dtype(about["properties"]))
            tensors.append(_Tensor(name, dtype, tuple(about["size"]), tuple(chunk(name, box) for box in boxes)))
        elif name.partition("/")[0] == "common_state":
            place = places[name, None]
            common = load_region(MappedFile(folder / str(place["relative_path"])), place["offset"], place["length"])
    return tensors, common[0] if isinstance(common, list) else common


def _index(key: Record) -> tuple[str, tuple[int, ...] | None]:
    """Name and offset of a chunk."""
    offset = key.attributes.get("offset")
    return key.attributes["fqn"], None if offset is None else tuple(offset)


def _dtype(properties: Record) -> Any:
    return properties.state[0] if isinstance(properties.state, tuple) else properties.attributes["dtype"]


def _unstacked(tensor: _Tensor) -> Mapping[str, Stored]:
    """A tensor by its layers and experts; one that holds none is left as it is."""
    names: dict[str, tuple[int, ...]] = {tensor.name: ()}
    if found := _LAYERS.match(tensor.name):
        names = {f"{found[1]}{layer}.{found[2]}": (layer,) for layer in range(tensor.shape[0])}
    stacked: dict[str, tuple[int, ...]] = {}
    for name, index in names.items():
        if found := _EXPERTS.match(name):
            stacked |= {f"{found[1]}{expert}.{found[2]}": (*index, expert) for expert in range(tensor.shape[len(index)])}
        else:
            stacked[name] = index
    return {name: tensor.stored(*index) for name, index in stacked.items()}
