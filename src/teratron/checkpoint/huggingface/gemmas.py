"""Gemma 1, 2 and 3 among Hugging Face's architectures: norms kept less 1, embeddings scaled; later ones with windows in most layers."""

from __future__ import annotations

import json
from typing import Any

from teratron.checkpoint.huggingface.decoders import decoder
from teratron.checkpoint.huggingface.llamas import ATTENTION, FEED_FORWARD, GROUPED, LAYER, LLAMA_TABLE, OUTSIDE, PLAIN, SHAPE
from teratron.checkpoint.huggingface.rotary import rope, scaling, written_scaling
from teratron.checkpoint.huggingface.settings import Architecture, Both, Form, Key, Like, Only, Ours, Settings, Table
from teratron.config import ModelConfig, UserError

_GEMMA_IMPLIED: Ours = {**PLAIN, "norm_less_one": True, "scale_embeddings": True}
_GEMMA = (
    *SHAPE,
    GROUPED,
    Key("head_dim", "head_dim", 256, property="head_features"),
    Key("tie_word_embeddings", "tie_embeddings", True),
    Only("attention_bias", False),
)
# The word gelu in Gemma's first files means its approximation, as it was trained with.
_GELU = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"}
GEMMA = Architecture(
    "gemma", "model.", decoder("Gemma", "score"),
    (*_GEMMA, rope(), Key("hidden_activation", "activation", "gelu_pytorch_tanh", _GELU, older="hidden_act")), LLAMA_TABLE, _GEMMA_IMPLIED,
)  # fmt: skip


def _alternating(settings: Settings) -> Ours:
    """Gemma 2: every other layer attends over the window alone."""
    _check_kinds(settings, 2)
    layers, window = settings.get("num_hidden_layers"), settings.content.get("sliding_window", 4096)
    if not window or window >= settings.get("max_position_embeddings"):
        return {}
    return {"window": window, "global_every": 2 if layers > 1 else 0}


def _check_kinds(settings: Settings, every: int) -> None:
    expected = _kinds(settings.get("num_hidden_layers"), every)
    if settings.get("layer_types", expected) != expected:
        raise UserError(f"'layer_types' = {json.dumps(settings.get('layer_types'))} is not supported, expected {json.dumps(expected)}")


def _kinds(layers: int, every: int) -> list[str]:
    """What layers attend to where every so many-th attends to all; 0 = none does."""
    return ["full_attention" if every and not layer % every else "sliding_attention" for layer in range(1, layers + 1)]


def _caps(attention: float, output: float) -> Both:
    """Bounds of scores and logits; null = none, and their defaults where nothing is said."""
    caps = {"attention_cap": ("attn_logit_softcapping", attention), "output_cap": ("final_logit_softcapping", output)}
    return Both(
        lambda settings: {ours: settings.content.get(theirs, default) or 0.0 for ours, (theirs, default) in caps.items()},
        lambda config: {theirs: getattr(config, ours) or None for ours, (theirs, _) in caps.items()},
    )


_GATED_GELU = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu", "silu": "swiglu"}
_SANDWICH: Table = {
    **OUTSIDE,
    **ATTENTION,
    **FEED_FORWARD,
    f"{LAYER}.input_layernorm.weight": "blocks.#.attention_norm.weight",
    f"{LAYER}.post_attention_layernorm.weight": "blocks.#.attention_output_norm.weight",
    f"{LAYER}.pre_feedforward_layernorm.weight": "blocks.#.ffn_norm.weight",
    f"{LAYER}.post_feedforward_layernorm.weight": "blocks.#.ffn_output_norm.weight",
}
GEMMA2 = Architecture(
    "gemma2",
    "model.",
    decoder("Gemma2", "score"),
    (
        *_GEMMA,
        rope(),
        Key("hidden_activation", "activation", "gelu_pytorch_tanh", _GATED_GELU),
        Both(_alternating, lambda config: {"sliding_window": config.window or config.positions, "layer_types": _kinds(config.layers, 2)}),
        _caps(50.0, 30.0),
        Like("query_pre_attn_scalar", "head_dim", 256),
    ),
    _SANDWICH,
    {**_GEMMA_IMPLIED, "norm_place": "sandwich"},
)


def _gemma3_windows(settings: Settings) -> Ours:
    """Gemma 3: every so many-th layer attends to all, with rotary positions of its own, the others over the window."""
    kinds, layers = settings.get("layer_types", None), settings.get("num_hidden_layers")
    every = settings.get("sliding_window_pattern", 6)
    if kinds is not None:
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    _check_kinds(settings, every)
    window = min(settings.get("sliding_window", 4096), settings.get("max_position_embeddings"))
    return {"window": window, "global_every": every if every <= layers else 0, **_gemma3_rope(settings)}


def _gemma3_rope(settings: Settings) -> Ours:
    both = settings.get("rope_parameters", {})
    everywhere, near = both.get("full_attention") or {}, both.get("sliding_attention") or {}
    stretched = settings.get("rope_scaling", {}) or everywhere
    if near.get("rope_type", "default") != "default":
        raise UserError(f"'rope_parameters' = {json.dumps(both)} is not supported, expected no scaling of sliding_attention")
    return {
        "rope_theta": everywhere.get("rope_theta", settings.get("rope_theta", 1e6)),
        "window_theta": near.get("rope_theta", settings.get("rope_local_base_freq", 1e4)),
        **(scaling("rope_scaling", stretched) if stretched else {}),
    }


def _gemma3_written(config: ModelConfig) -> dict[str, Any]:
    every = {"sliding_window_pattern": config.global_every} if config.global_every else {}
    return every | {
        "sliding_window": config.window, "layer_types": _kinds(config.layers, config.global_every), "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.window_theta, "rope_scaling": written_scaling(config),
    }  # fmt: skip


GEMMA3 = Architecture(
    "gemma3_text",
    "model.",
    {"Gemma3ForCausalLM": Form(), "Gemma3TextModel": Form({"head": "none"}, bare=True)},
    (
        *_GEMMA,
        Key("hidden_activation", "activation", "gelu_pytorch_tanh", _GATED_GELU),
        Both(_gemma3_windows, _gemma3_written),
        _caps(0.0, 0.0),
        Like("query_pre_attn_scalar", "head_dim", 256),
        Only("use_bidirectional_attention", False),
    ),
    _SANDWICH,
    {**_GEMMA_IMPLIED, "norm_place": "sandwich", "qk_norm": True},
)
GEMMAS = (GEMMA, GEMMA2, GEMMA3)
