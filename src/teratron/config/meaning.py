"""What of a model's config decides what its weights compute, however it is spelled."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from teratron.config.model import ModelConfig

LEARNT_OTHERWISE = (
    "seq_length", "max_positions", "vocab_multiple", "dropout", "attention_dropout", "init_std", "embedding_std", "aux_loss", "bias_rate",
    "z_loss", "capacity",
)  # fmt: skip
"""Keys of training, which change nothing of what given weights compute."""
_SPELLED_OUT = {
    "kv_heads": "key_value_heads", "head_dim": "head_features", "ffn": "ffn_width", "expert_ffn": "expert_width",
    "value_dim": "value_features", "rope_fast": "fast_turns", "rope_sharpness": "sharpness",
}  # fmt: skip
"""Keys whose 0 stands for a number that follows from others, and the property that is that number."""
_EXPERTS = (
    "experts_per_token", "expert_ffn", "shared_experts", "moe_every", "moe_first_dense", "router", "router_groups", "groups_per_token",
    "normalise_gates", "gate_scale", "router_balance",
)  # fmt: skip
_ROTARY = ("rope_theta", "rope_share", "rope_scaling", "rope_factor", "rope_original", "rope_slow", "rope_fast", "rope_sharpness")


def meaning(model: ModelConfig) -> dict[str, Any]:
    """Every key of `model.*` that matters to these weights, with its value spelled out."""
    unused = {*LEARNT_OTHERWISE, *_unused(model)}
    names = [field.name for field in fields(model) if field.name not in unused]
    return {name: getattr(model, _SPELLED_OUT.get(name, name)) for name in names}


def _unused(model: ModelConfig) -> set[str]:
    """Keys of what the model has not."""
    unused = set() if model.experts else set(_EXPERTS)
    unused |= {"ffn"} if all(map(model.routed, range(model.layers))) else set()
    unused |= {"groups_per_token"} if model.router_groups == 1 else set()
    unused |= set() if model.position == "rope" else set(_ROTARY)
    unused |= {"rope_slow", "rope_fast", "rope_sharpness"} if model.rope_scaling in ("none", "linear", "ntk") else set()
    unused |= set() if model.position == "relative" else {"relative_buckets", "relative_distance"}
    unused |= set() if model.head == "language" else {"head_transform", "tie_embeddings", "scale_output", "logit_scale", "output_cap"}
    unused |= set() if model.head == "classes" else {"class_bias"}
    unused |= set() if model.adapter_rank else {"adapter_alpha", "adapter_targets"}
    return unused
