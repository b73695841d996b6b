"""How Megatron-LM names and lays out a model's tensors, and which of our parts each holds.

Names are those of megatron-core's own layers; `canonical` turns those of Transformer Engine's fused layers and of releases before
megatron-core into them. Shapes are whole: how tensor ranks cut them is `Row.split` and `Row.join`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import ModelConfig

STACK = {"gpt": "decoder", "encoder": "encoder"}
"""What Megatron-LM calls the blocks of a family."""
_RENAMED = (
    (r"^(module\.)+", ""),
    (r"^language_model\.(embedding|output_layer|pooler)\b", r"\1"),
    (r"^(language_model\.)?(encoder|transformer|decoder)\.", "blocks."),
    (r"\.(self_attention|attention)\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_attention|attention)\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.(post_attention_norm|post_attention_layernorm)\.", ".pre_mlp_layernorm."),
    (r"^blocks\.final_norm\.", "blocks.final_layernorm."),
    (r"^lm_head\.layernorm\.", "lm_head.layer_norm."),
    (r"^lm_head\.bias$", "output_layer.bias"),
    (r"\.mlp\.experts\.(?:local_experts|experts)\.(\d+)\.", r".mlp.experts.\1."),
    (r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r".mlp.experts.\2.\1.weight"),
)
"""Patterns of names and what they become, in this order."""


def canonical(name: str) -> str:
    """What a tensor is called here, `blocks.` standing for decoder or encoder."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Row:
    """One tensor of Megatron-LM."""

    name: str
    """Canonical."""
    parts: tuple[str, ...]
    """Ours, in the order in which it holds them."""
    cut: int | None = None
    """The dimension that tensor ranks cut; None = each has all of it."""
    kind: Literal["plain", "table", "qkv", "gated"] = "plain"
    """How parts lie in it: alone, alone with padding below, each group's queries, keys and values in turn, one below the other."""
    expert: int | None = None
    """Of stacked parts it holds this expert's."""

    def split(self, tensor: Tensor, ranks: int) -> list[Tensor]:
        """Each tensor rank's share; of a gated layer a share of both halves."""
        if self.cut is None:
            return [tensor] * ranks
        if self.kind == "gated":
            return [torch.cat(halves) for halves in zip(*(half.chunk(ranks) for half in tensor.chunk(2)), strict=True)]
        return list(tensor.chunk(ranks, self.cut))

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole tensor of the shares of all tensor ranks."""
        if self.cut is None or len(pieces) == 1:
            return pieces[0]
        if self.kind == "gated":
            return torch.cat([piece.chunk(2)[half] for half in (0, 1) for piece in pieces])
        return torch.cat(list(pieces), self.cut)

    def unpack(self, tensor: Tensor, part: str, config: ModelConfig) -> Tensor:
        """One of its parts."""
        place = self.parts.index(part)
        if self.kind == "table":
            return tensor[: config.vocab_size]
        if self.kind == "gated":
            return tensor.chunk(2)[place]
        if self.kind == "plain":
            return tensor
        groups = tensor.unflatten(0, (config.key_value_heads, -1))
        return groups.split(_group(config), dim=1)[place].flatten(0, 1)

    def pack(self, parts: Sequence[Tensor], config: ModelConfig, vocab: int) -> Tensor:
        """The tensor of its parts; vocab: rows of a table, padding included."""
        if self.kind == "table":
            return F.pad(parts[0], (0, 0) * (parts[0].dim() - 1) + (0, vocab - len(parts[0])))
        if self.kind == "qkv":
            return torch.cat([part.unflatten(0, (config.key_value_heads, -1)) for part in parts], dim=1).flatten(0, 1)
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]

    def shape(self, shapes: Sequence[tuple[int, ...]], vocab: int) -> tuple[int, ...]:
        """Its shape, from those of its parts."""
        rest = shapes[0][1:]
        return (vocab if self.kind == "table" else sum(shape[0] for shape in shapes), *rest)


def _group(config: ModelConfig) -> list[int]:
    """Rows of queries, keys and values of one group of heads."""
    width = config.head_features
    return [config.heads // config.key_value_heads * width, width, width]


def rows_of(config: ModelConfig) -> Iterator[Row]:
    """All tensors of a model that `check_expressible` lets pass, in the order of its modules."""
    yield Row("embedding.word_embeddings.weight", ("embedding.tokens.weight",), 0, "table")
    if config.position == "learned":
        yield Row("embedding.position_embeddings.weight", ("embedding.positions.weight",))
    if config.token_types:
        yield Row("embedding.tokentype_embeddings.weight", ("embedding.types.weight",))
    for layer in range(config.layers):
        yield from _block(config, layer)
    yield from _norm(config, "blocks.final_layernorm", "head.norm")
    if config.head_transform:
        yield from _linear(config, "lm_head.dense", "head.transform")
        yield from _norm(config, "lm_head.layer_norm", "head.transform_norm")
    if not config.tie_embeddings:
        yield Row("output_layer.weight", ("head.output.weight",), 0, "table")
    if config.output_bias:
        yield Row("output_layer.bias", ("head.output.bias",), 0, "table")
    if config.pooler:
        yield from _linear(config, "pooler.dense", "head.pooler")
        yield from _linear(config, "binary_head", "head.sentence")


def _block(config: ModelConfig, layer: int) -> Iterator[Row]:
    theirs, ours = f"blocks.layers.{layer}", f"blocks.{layer}"
    attention = f"{ours}.attention"
    yield from _norm(config, f"{theirs}.input_layernorm", f"{ours}.attention_norm")
    for kind in ("weight", "bias") if config.qkv_bias else _kinds(config):
        parts = tuple(f"{attention}.{part}.{kind}" for part in "qkv")
        yield Row(f"{theirs}.self_attention.linear_qkv.{kind}", parts, 0, "qkv")
    for name in "qk" if config.qk_norm else "":
        yield Row(f"{theirs}.self_attention.{name}_layernorm.weight", (f"{attention}.{name}_norm.weight",))
    yield from _linear(config, f"{theirs}.self_attention.linear_proj", f"{attention}.output", 1)
    yield from _norm(config, f"{theirs}.pre_mlp_layernorm", f"{ours}.ffn_norm")
    if config.routed(layer):
        yield from _mixture(config, f"{theirs}.mlp", f"{ours}.ffn")
    else:
        for kind in _kinds(config):
            yield from _first(config, f"{theirs}.mlp.linear_fc1.{kind}", f"{ours}.ffn.{{}}.{kind}")
        yield from _linear(config, f"{theirs}.mlp.linear_fc2", f"{ours}.ffn.down", 1)


def _mixture(config: ModelConfig, theirs: str, ours: str) -> Iterator[Row]:
    yield Row(f"{theirs}.router.weight", (f"{ours}.router.weight",))
    if config.router_balance == "bias":
        yield Row(f"{theirs}.router.expert_bias", (f"{ours}.router.bias",))
    for expert in range(config.experts):
        yield from _first(config, f"{theirs}.experts.{expert}.linear_fc1.weight", f"{ours}.experts.{{}}.weight", expert)
        yield Row(f"{theirs}.experts.{expert}.linear_fc2.weight", (f"{ours}.experts.down.weight",), 1, expert=expert)
    if config.shared_experts:
        yield from _first(config, f"{theirs}.shared_experts.linear_fc1.weight", f"{ours}.shared.{{}}.weight")
        yield Row(f"{theirs}.shared_experts.linear_fc2.weight", (f"{ours}.shared.down.weight",), 1)


def _first(config: ModelConfig, theirs: str, ours: str, expert: int | None = None) -> Iterator[Row]:
    """The first matrix or bias of a feed-forward layer, gated or not."""
    names = ("gate", "up") if config.gated else ("up",)
    yield Row(theirs, tuple(ours.format(name) for name in names), 0, "gated" if config.gated else "plain", expert)


def _linear(config: ModelConfig, theirs: str, ours: str, cut: int | None = None) -> Iterator[Row]:
    """A matrix, cut or not, and its bias, which every rank has."""
    for kind in _kinds(config):
        yield Row(f"{theirs}.{kind}", (f"{ours}.{kind}",), cut if kind == "weight" else None)


def _norm(config: ModelConfig, theirs: str, ours: str) -> Iterator[Row]:
    kinds = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    return (Row(f"{theirs}.{kind}", (f"{ours}.{kind}",)) for kind in kinds)


def _kinds(config: ModelConfig) -> tuple[str, ...]:
    return ("weight", "bias") if config.bias else ("weight",)
