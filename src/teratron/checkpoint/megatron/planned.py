"""What torch.distributed.checkpoint writes, planned ahead: the numbers of a tensor are made when its turn has come."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


class Chunk(NamedTuple):
    """A tensor with an index in the first dimensions of another, which is what is stored."""

    name: str
    whole: tuple[int, ...]
    at: tuple[int, ...]
    dtype: torch.dtype
    values: Callable[[], Tensor]

    @property
    def offset(self) -> torch.Size:
        return torch.Size((*self.at, *(0,) * (len(self.whole) - len(self.at))))

    @property
    def size(self) -> torch.Size:
        return torch.Size(((1,) * len(self.at)) + self.whole[len(self.at) :])


class Planner(DefaultSavePlanner):
    """Writes chunks and objects, whatever state it is given."""

    def __init__(self, chunks: Sequence[Chunk], objects: Mapping[str, Callable[[], io.BytesIO]]) -> None:
        super().__init__(flatten_state_dict=False)
        self.chunks = {MetadataIndex(chunk.name, chunk.offset): chunk for chunk in chunks}
        self.objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [_item(index, chunk) for index, chunk in self.chunks.items()]
        self.plan = SavePlan([*items, *(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.objects)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type is WriteItemType.BYTE_IO:
            return self.objects[write_item.index.fqn]()
        index = MetadataIndex(write_item.index.fqn, write_item.index.offset)
        return self.chunks[index].values().reshape(self.chunks[index].size)


def _item(index: MetadataIndex, chunk: Chunk) -> WriteItem:
    place = ChunkStorageMetadata(chunk.offset, chunk.size)
    properties = TensorProperties(dtype=chunk.dtype)
    return WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(place, properties, torch.Size(chunk.whole)))
