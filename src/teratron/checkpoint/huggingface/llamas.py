"""Decoders with RMSNorm and rotary positions: Llama, Mistral, Mixtral, Qwen, Gemma, DeepSeek."""

from __future__ import annotations

import json
import math
from typing import Any

from teratron.checkpoint.huggingface.decoders import INIT, VOCABULARY, decoder
from teratron.checkpoint.huggingface.layouts import NEIGHBOURS, STACKED, Row
from teratron.checkpoint.huggingface.rotary import rope
from teratron.checkpoint.huggingface.settings import Architecture, Both, Key, Like, Only, Ours, Setting, Settings, Table, Told
from teratron.config import ModelConfig, UserError

_LAYER = "model.layers.#"
_SHAPE: tuple[Setting, ...] = (
    Key("num_hidden_layers", "layers"),
    Key("hidden_size", "hidden"),
    Key("num_attention_heads", "heads"),
    Key("intermediate_size", "ffn", property="ffn_width"),
    Key("max_position_embeddings", "seq_length", property="positions"),
    VOCABULARY,
    Key("rms_norm_eps", "norm_eps", 1e-6),
    INIT,
    Told("attention_dropout", "attention_dropout"),
)
_GROUPED = Key("num_key_value_heads", "kv_heads", 0, property="key_value_heads")
_UNTIED = Key("tie_word_embeddings", "tie_embeddings", False)
_SILU = Key("hidden_act", "activation", "silu", {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "swish": "swiglu"})
_HEAD = Key("head_dim", "head_dim", 0, property="head_features")
_IMPLIED: Ours = {"norm": "rmsnorm", "position": "rope"}
_PLAIN: Ours = {**_IMPLIED, "bias": False}

_OUTSIDE: Table = {
    "model.embed_tokens.weight": "embedding.tokens.weight",
    "model.norm.weight": "head.norm.weight",
    "lm_head.weight": "head.output.weight",
}
_ATTENTION: Table = {
    **{f"{_LAYER}.self_attn.{name}_proj.*": f"blocks.#.attention.{name}.*" for name in "qkv"},
    f"{_LAYER}.self_attn.o_proj.*": "blocks.#.attention.output.*",
    **{f"{_LAYER}.self_attn.{name}_norm.weight": f"blocks.#.attention.{name}_norm.weight" for name in "qk"},
}
_NORMS: Table = {
    f"{_LAYER}.input_layernorm.weight": "blocks.#.attention_norm.weight",
    f"{_LAYER}.post_attention_layernorm.weight": "blocks.#.ffn_norm.weight",
}
_FEED_FORWARD: Table = {f"{_LAYER}.mlp.{name}_proj.*": f"blocks.#.ffn.{name}.*" for name in ("gate", "up", "down")}
_LLAMA: Table = {**_OUTSIDE, **_ATTENTION, **_NORMS, **_FEED_FORWARD}


def _experts(place: str, names: dict[str, str]) -> Table:
    return {f"{_LAYER}.{place}.@.{theirs}.weight": Row((f"blocks.#.ffn.experts.{ours}.weight",), STACKED) for theirs, ours in names.items()}


_EXPERTS = _experts("mlp.experts", {f"{name}_proj": name for name in ("gate", "up", "down")})
_ROUTER: Table = {f"{_LAYER}.mlp.gate.weight": "blocks.#.ffn.router.weight"}


def _window(default: int | None) -> Both:
    """default: their window where none is said."""

    def read(settings: Settings) -> Ours:
        found = settings.content.get("sliding_window", default)
        return {"window": found if found and found < settings.get("max_position_embeddings") else 0}

    return Both(read, lambda config: {"sliding_window": config.window or None})


def _everywhere(settings: Settings) -> Ours:
    """Layers may be named by what they attend to; without a window all are alike."""
    kinds = settings.get("layer_types", [])
    if any(kind != "full_attention" for kind in kinds):
        raise UserError(f"'layer_types' = {json.dumps(kinds)} is not supported, expected full_attention for every layer")
    return {}


_FULL: tuple[Setting, ...] = (Only("use_sliding_window", False), Both(_everywhere, lambda _: {}))

LLAMA = Architecture(
    "llama",
    "model.",
    decoder("Llama", "score"),
    (*_SHAPE, _GROUPED, _HEAD, _UNTIED, _SILU, rope(), Key("attention_bias", "bias", False), Like("mlp_bias", "attention_bias", False)),
    _LLAMA,
    _IMPLIED,
)
MISTRAL = Architecture(
    "mistral", "model.", decoder("Mistral", "score"), (*_SHAPE, _GROUPED, _HEAD, _UNTIED, _SILU, rope(), _window(4096)), _LLAMA, _PLAIN
)
QWEN2 = Architecture(
    "qwen2", "model.", decoder("Qwen2", "score"), (*_SHAPE, _GROUPED, _HEAD, _UNTIED, _SILU, rope(), *_FULL), _LLAMA,
    {**_PLAIN, "qkv_bias": True},
)  # fmt: skip
_QWEN3 = (_GROUPED, Key("head_dim", "head_dim", 128, property="head_features"), _UNTIED, _SILU, rope(), Only("attention_bias", False))
QWEN3 = Architecture(
    "qwen3", "model.", decoder("Qwen3", "score"), (*_SHAPE, *_QWEN3, *_FULL), _LLAMA, {**_PLAIN, "qk_norm": True}
)  # fmt: skip
QWEN3_MOE = Architecture(
    "qwen3_moe",
    "model.",
    decoder("Qwen3Moe", "score"),
    (
        *_SHAPE,
        *_QWEN3,
        Only("use_sliding_window", False),
        Key("num_experts", "experts", 128, older="num_local_experts"),
        Key("num_experts_per_tok", "experts_per_token", 8),
        Key("moe_intermediate_size", "expert_ffn", 768, property="expert_width"),
        Key("norm_topk_prob", "normalise_gates", False),
        Key("router_aux_loss_coef", "aux_loss", 0.001),
        Key("decoder_sparse_step", "moe_every", 1),
        Key("decoder_sparse_step", "moe_first_dense", 1, shift=1),  # the last of each group of layers has experts
        Only("mlp_only_layers", [], (None,)),
    ),
    {**_LLAMA, **_EXPERTS, **_ROUTER},
    {**_PLAIN, "qk_norm": True},
)
MIXTRAL = Architecture(
    "mixtral",
    "model.",
    decoder("Mixtral", "score"),
    (
        *_SHAPE, _GROUPED, _HEAD, _UNTIED, _SILU, rope(1e6), _window(None),
        Key("num_local_experts", "experts", 8),
        Key("num_experts_per_tok", "experts_per_token", 2),
        Key("router_aux_loss_coef", "aux_loss", 0.001),
    ),
    {
        **_OUTSIDE, **_ATTENTION, **_NORMS,
        **_experts("block_sparse_moe.experts", {"w1": "gate", "w2": "down", "w3": "up"}),
        f"{_LAYER}.block_sparse_moe.gate.weight": "blocks.#.ffn.router.weight",
    },
    {**_PLAIN, "normalise_gates": True},
)  # fmt: skip

_GEMMA_IMPLIED: Ours = {**_PLAIN, "norm_less_one": True, "scale_embeddings": True}
_GEMMA = (
    *_SHAPE,
    _GROUPED,
    Key("head_dim", "head_dim", 256, property="head_features"),
    Key("tie_word_embeddings", "tie_embeddings", True),
    rope(),
    Only("attention_bias", False),
)
# The word gelu in Gemma's first files means its approximation, as it was trained with.
_GELU = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"}
GEMMA = Architecture(
    "gemma", "model.", decoder("Gemma", "score"),
    (*_GEMMA, Key("hidden_activation", "activation", "gelu_pytorch_tanh", _GELU, older="hidden_act")), _LLAMA, _GEMMA_IMPLIED,
)  # fmt: skip


def _alternating(settings: Settings) -> Ours:
    """Gemma 2: every other layer attends over the window alone."""
    layers, window = settings.get("num_hidden_layers"), settings.content.get("sliding_window", 4096)
    expected = _kinds(layers)
    if settings.get("layer_types", expected) != expected:
        raise UserError(f"'layer_types' = {json.dumps(settings.get('layer_types'))} is not supported, expected {json.dumps(expected)}")
    if not window or window >= settings.get("max_position_embeddings"):
        return {}
    return {"window": window, "global_every": 2 if layers > 1 else 0}


def _kinds(layers: int) -> list[str]:
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def _gemma2_caps(settings: Settings) -> Ours:
    caps = {"attention_cap": ("attn_logit_softcapping", 50.0), "output_cap": ("final_logit_softcapping", 30.0)}
    return {ours: settings.content.get(theirs, default) or 0.0 for ours, (theirs, default) in caps.items()}


GEMMA2 = Architecture(
    "gemma2",
    "model.",
    decoder("Gemma2", "score"),
    (
        *_GEMMA,
        Key("hidden_activation", "activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu", "silu": "swiglu"}),
        Both(_alternating, lambda config: {"sliding_window": config.window or config.positions, "layer_types": _kinds(config.layers)}),
        Both(
            _gemma2_caps,
            lambda config: {
                "attn_logit_softcapping": config.attention_cap or None, "final_logit_softcapping": config.output_cap or None
            },
        ),
        Like("query_pre_attn_scalar", "head_dim", 256),
    ),
    {
        **_OUTSIDE,
        **_ATTENTION,
        **_FEED_FORWARD,
        f"{_LAYER}.input_layernorm.weight": "blocks.#.attention_norm.weight",
        f"{_LAYER}.post_attention_layernorm.weight": "blocks.#.attention_output_norm.weight",
        f"{_LAYER}.pre_feedforward_layernorm.weight": "blocks.#.ffn_norm.weight",
        f"{_LAYER}.post_feedforward_layernorm.weight": "blocks.#.ffn_output_norm.weight",
    },
    {**_GEMMA_IMPLIED, "norm_place": "sandwich"},
)  # fmt: skip

_PROJECTIONS = {"q_a_proj": "q_down", "q_a_layernorm": "q_down_norm", "kv_a_layernorm": "kv_down_norm", "kv_b_proj": "kv_up"}
_LATENT: Table = {
    **_OUTSIDE,
    **_NORMS,
    **_FEED_FORWARD,
    **_EXPERTS,
    **_ROUTER,
    f"{_LAYER}.mlp.gate.e_score_correction_bias": "blocks.#.ffn.router.bias",
    **{f"{_LAYER}.mlp.shared_experts.{name}_proj.weight": f"blocks.#.ffn.shared.{name}.weight" for name in ("gate", "up", "down")},
    **{f"{_LAYER}.self_attn.{theirs}.weight": f"blocks.#.attention.{ours}.weight" for theirs, ours in _PROJECTIONS.items()},
    f"{_LAYER}.self_attn.q_proj.weight": Row(("blocks.#.attention.q.weight",), NEIGHBOURS),
    f"{_LAYER}.self_attn.q_b_proj.weight": Row(("blocks.#.attention.q_up.weight",), NEIGHBOURS),
    f"{_LAYER}.self_attn.kv_a_proj_with_mqa.weight": Row(
        ("blocks.#.attention.latent.weight", "blocks.#.attention.k_rotated.weight"), NEIGHBOURS
    ),
    f"{_LAYER}.self_attn.o_proj.weight": "blocks.#.attention.output.weight",
}


def _yarn(settings: Settings) -> Ours:
    """YaRN sharpens all of latent attention's scores, by numbers that other models have not."""
    key = "rope_scaling" if settings.get("rope_scaling", {}) else "rope_parameters"
    said: dict[str, Any] = dict(settings.get(key, {}))
    scales = {said.pop(name, 0.0) for name in ("mscale", "mscale_all_dim")}
    ours = rope().read(Settings({**settings.content, key: said}))
    if ours.get("rope_scaling") != "yarn":
        return ours
    if len(scales) > 1 or 0.0 in scales:
        raise UserError(f"'{key}' = {json.dumps(settings.get(key))} is not supported, expected mscale and mscale_all_dim of one value")
    (scale,) = scales
    return ours | {"rope_sharpness": 0.0 if scale == 1 else round(0.1 * scale * math.log(ours["rope_factor"]) + 1, 12)}


def _yarn_written(config: ModelConfig) -> dict[str, Any]:
    said = rope().write(config)
    if config.rope_scaling == "yarn":
        said["rope_scaling"].pop("attention_factor", None)
        scale = round((config.sharpness - 1) / (0.1 * math.log(config.rope_factor)), 9) if config.rope_sharpness else 1.0
        said["rope_scaling"] |= {"mscale": scale, "mscale_all_dim": scale}
    return said


def _short_queries(settings: Settings) -> Ours:
    return {"latent_query": settings.content.get("q_lora_rank", 1536) or 0}


_DEEPSEEK = (
    *_SHAPE,
    _UNTIED,
    _SILU,
    Both(_yarn, _yarn_written),
    Key("qk_nope_head_dim", "head_dim", 128, property="head_features"),
    Key("qk_rope_head_dim", "rope_dim", 64),
    Key("v_head_dim", "value_dim", 128, property="value_features"),
    Key("kv_lora_rank", "latent", 512),
    Key("moe_intermediate_size", "expert_ffn", property="expert_width"),
    Key("n_routed_experts", "experts"),
    Key("n_shared_experts", "shared_experts", 0),
    Key("num_experts_per_tok", "experts_per_token"),
    Key("routed_scaling_factor", "gate_scale", 1.0),
    Key("n_group", "router_groups", 1),
    Key("topk_group", "groups_per_token", 1),
    Key("first_k_dense_replace", "moe_first_dense", 0),
    Only("attention_bias", False),
    Only("moe_layer_freq", 1),
    Both(_short_queries, lambda config: {"q_lora_rank": config.latent_query or None}),
    Like("num_key_value_heads", "num_attention_heads"),
)  # fmt: skip
DEEPSEEK3 = Architecture(
    "deepseek_v3",
    "model.",
    decoder("DeepseekV3", "score"),
    (
        *_DEEPSEEK,
        Key("norm_topk_prob", "normalise_gates", True),
        Only("rope_interleave", True),
        Only("scoring_func", "sigmoid"),
        Only("topk_method", "noaux_tc"),
    ),
    _LATENT,
    {**_PLAIN, "router": "sigmoid", "router_balance": "bias"},
)


def _grouped(settings: Settings) -> Ours:
    """Whether groups of experts mean anything."""
    settings.only("topk_method", "greedy", "group_limited_greedy")
    return {"router_groups": 1, "groups_per_token": 1} if settings.get("topk_method", "greedy") == "greedy" else {}


DEEPSEEK2 = Architecture(
    "deepseek_v2",
    "model.",
    decoder("DeepseekV2", "score"),
    (
        *_DEEPSEEK,
        Only("norm_topk_prob", False),
        Only("scoring_func", "softmax"),
        Both(_grouped, lambda config: {"topk_method": "greedy" if config.router_groups == 1 else "group_limited_greedy"}),
    ),
    _LATENT,
    {**_PLAIN, "router": "softmax"},
)
LLAMAS = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GEMMA, GEMMA2, DEEPSEEK3, DEEPSEEK2)
