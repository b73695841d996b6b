"""Write a checkpoint that Megatron-LM reads: `torch_dist`, or `mp_rank_*` for the degrees that will read it."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.format import check_space, publish
from teratron.checkpoint.megatron.arguments import arguments_of_model
from teratron.checkpoint.megatron.opened import TRACKER, open_megatron
from teratron.checkpoint.megatron.rows import STACK, Row, rows_of
from teratron.checkpoint.probe import Compared, compare
from teratron.checkpoint.source import Weights
from teratron.config import ModelConfig, UserError

FORMATS = ("torch_dist", "legacy")
VERSION = 3.0
"""Of the order of queries, keys and values, as Megatron-LM counts."""
_LINEAR = re.compile(r"\.linear_(qkv|proj|fc1|fc2)\.weight$")
"""Tensors of modules that have a state of their own, which is empty."""


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut."""

    tensor: int = 1
    pipeline: int = 1

    def vocab(self, model: ModelConfig) -> int:
        """Rows of the table, which Megatron-LM pads by the tensor ranks."""
        multiple = model.vocab_multiple * self.tensor
        return -(-model.vocab_size // multiple) * multiple


class Source:
    """The tensors of Megatron-LM, made of a model's parts when they are asked for."""

    def __init__(self, weights: Weights, layout: Layout) -> None:
        self.config, self.layout = weights.config, layout
        self.vocab = layout.vocab(weights.config)
        self.parts = {entry.name: entry for entry in weights.parts}
        self.rows = list(rows_of(weights.config))

    def dtype(self, row: Row) -> torch.dtype:
        return self.parts[row.parts[0]].dtype

    def shape(self, row: Row) -> tuple[int, ...]:
        """A tensor's whole shape."""
        shapes = [tuple(self.parts[part].shape) for part in row.parts]
        return row.shape(shapes if row.expert is None else [shape[1:] for shape in shapes], self.vocab)

    def tensor(self, row: Row) -> Tensor:
        """A whole tensor, on CPU."""
        parts = [self.parts[part] for part in row.parts]
        values = [entry.values() if row.expert is None else entry.values()[row.expert] for entry in parts]
        return row.pack([value.detach().to("cpu", self.dtype(row)) for value in values], self.config, self.vocab)

    def name(self, row: Row) -> str:
        """What Transformer Engine's layers call it, which hold the norm before them."""
        name = re.sub(r"\.input_layernorm\.(\w+)$", r".self_attention.linear_qkv.layer_norm_\1", row.name)
        layer = layer_of(row)
        if layer is None or not self.config.routed(layer):
            name = fused_name(name)
        return re.sub(r"^blocks\.", f"{STACK[self.config.family]}.", name)


def fused_name(name: str) -> str:
    """What the norm before a feed-forward layer is called where Transformer Engine's first linear layer holds it."""
    return re.sub(r"\.pre_mlp_layernorm\.(\w+)$", r".mlp.linear_fc1.layer_norm_\1", name)


def layer_of(row: Row) -> int | None:
    """The number of the block that a tensor is of."""
    found = re.match(r"blocks\.layers\.(\d+)\.", row.name)
    return int(found[1]) if found else None


def write_megatron(weights: Weights, output: Path, layout: Layout, kind: str = "torch_dist", overwrite: bool = False) -> Compared:
    """Write weights as a run of Megatron-LM with one iteration, `release` where no steps were done.

    Tensor by tensor for torch_dist, rank by rank for legacy: no more is in memory. The iteration appears when it has been read back and
    compared. Raises `UserError` for a model that Megatron-LM
    does not have, degrees that do not divide it, an output that exists (without overwrite) or cannot be written.
    """
    args = arguments_of_model(weights.config, layout.vocab(weights.config))
    _check_layout(weights.config, layout, kind)
    if output.is_file() or (output.exists() and not overwrite and any(output.iterdir())):
        raise UserError(f"{output}: exists: choose another name, or for a folder add --overwrite")
    name = f"iter_{weights.step:07d}" if weights.step else "release"
    partial = output / f".{name}.partial"
    args |= {"tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline, "iteration": weights.step}
    args |= {"expert_model_parallel_size": 1, "ckpt_format": "torch" if kind == "legacy" else kind, "use_dist_ckpt": kind != "legacy"}
    content = {"args": argparse.Namespace(**args), "checkpoint_version": VERSION, "iteration": weights.step}
    try:
        output.mkdir(parents=True, exist_ok=True)
        check_space(output, sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in weights.parts))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (_write_ranks if kind == "legacy" else _write_distributed)(Source(weights, layout), partial, content)
        compared = compare(weights, open_megatron(partial))
        publish(partial, output / name)
        (output / TRACKER).write_text(str(weights.step or "release"), "utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}: free some space, or choose another place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return compared


def _check_layout(model: ModelConfig, layout: Layout, kind: str) -> None:
    if model.layers % layout.pipeline:
        raise UserError(f"--pipeline {layout.pipeline} does not divide model.layers = {model.layers}: choose a divisor")
    widths = {"model.kv_heads": model.key_value_heads, "model.ffn": model.ffn_width} | (
        {"model.expert_ffn": model.expert_width} if model.experts else {}
    )
    for key, count in widths.items():
        if count % layout.tensor:
            raise UserError(f"--tensor {layout.tensor} does not divide {key} = {count}: choose a divisor")
    if kind != "legacy" and layout.pipeline > 1:
        raise UserError(f"--pipeline {layout.pipeline} concerns --format legacy: torch_dist is read by any layout, leave it out")


def _write_ranks(source: Source, folder: Path, content: Mapping[str, Any]) -> None:
    """A file for every tensor and pipeline rank."""
    layout = source.layout
    for stage in range(layout.pipeline):
        for rank in range(layout.tensor):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")
            (folder / name).mkdir()
            torch.save({**content, "model": dict(_of_rank(source, stage, rank))}, folder / name / "model_optim_rng.pt")


def _of_rank(source: Source, stage: int, rank: int) -> Iterator[tuple[str, Tensor | None]]:
    """The tensors of a rank under its own names: layers count from the first of its stage, modules have empty states."""
    config, stages = source.config, source.layout.pipeline
    per_stage, last = config.layers // stages, stages - 1
    for row in source.rows:
        layer, head = layer_of(row), not row.name.startswith(("embedding.", "blocks.layers."))
        if stage != (layer // per_stage if layer is not None else last if head else 0):
            continue
        name = source.name(row).replace(f".layers.{layer}.", f".layers.{(layer or 0) - stage * per_stage}.")
        name = re.sub(r"\.experts\.(\d+)\.", r".experts.local_experts.\1.", name)
        yield name, _share(source, row, rank)
        if _LINEAR.search(row.name):
            yield name.removesuffix("weight") + "_extra_state", None
    if stage == last and stages > 1 and config.tie_embeddings:
        yield "output_layer.weight", _share(source, source.rows[0], rank)


def _share(source: Source, row: Row, rank: int) -> Tensor:
    """A rank's share in memory of its own: torch.save writes all of what a view looks at."""
    return row.split(source.tensor(row), source.layout.tensor)[rank].clone()


def _write_distributed(source: Source, folder: Path, content: Mapping[str, Any]) -> None:
    """A directory of torch.distributed.checkpoint beside the common state."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    from teratron.checkpoint.megatron.planned import Chunk, Planner

    chunks = [Chunk(*_place(source, row), source.dtype(row), partial(source.tensor, row)) for row in source.rows]
    # Where a layer has experts, megatron-core's own layers look for the norm before them under the name of a dense layer.
    chunks += [chunk._replace(name=fused) for chunk in chunks if (fused := fused_name(chunk.name)) != chunk.name]
    save({}, storage_writer=FileSystemWriter(folder), planner=Planner(chunks, _empty_states(source)), no_dist=True)
    torch.save(dict(content), folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend), "utf-8")


def _place(source: Source, row: Row) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The name of what a tensor is stacked in, its whole shape, and the tensor's index in that."""
    config, shape, layer = source.config, source.shape(row), layer_of(row)
    name, whole = source.name(row), shape
    index: tuple[int, ...] = ()
    if row.expert is not None:
        name = re.sub(r"\.experts\.\d+\.", ".experts.experts.", name)
        whole, index = (config.experts, *whole), (row.expert,)
    if layer is not None and _alike(config):
        name = name.replace(f".layers.{layer}.", ".layers.")
        whole, index = (config.layers, *whole), (layer, *index)
    return name, whole, index


def _alike(config: ModelConfig) -> bool:
    """Whether all layers have the same tensors, which are then stacked."""
    return all(config.routed(layer) == config.routed(0) for layer in range(config.layers))


def _empty_states(source: Source) -> dict[str, Callable[[], io.BytesIO]]:
    """The states of linear modules, which megatron-core asks for though they are empty."""

    def empty() -> io.BytesIO:
        buffer = io.BytesIO()
        torch.save([None], buffer)
        return buffer

    places = [_place(source, row) for row in source.rows if _LINEAR.search(row.name)]
    names = [(name.removesuffix("weight"), index or (0,), whole[: len(index)] or (1,)) for name, whole, index in places]
    return {f"{name}_extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}": empty for name, index, sizes in names}
