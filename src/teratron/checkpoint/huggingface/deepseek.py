"""DeepSeek V2 and V3 among Hugging Face's architectures: latent attention, and experts of which some see every token."""

from __future__ import annotations

import json
import math
from typing import Any

from teratron.checkpoint.huggingface.decoders import bare_decoder, decoder
from teratron.checkpoint.huggingface.layouts import NEIGHBOURS, Row
from teratron.checkpoint.huggingface.llamas import EXPERTS, FEED_FORWARD, LAYER, NORMS, OUTSIDE, PLAIN, ROUTER, SHAPE, SILU, UNTIED
from teratron.checkpoint.huggingface.rotary import rope
from teratron.checkpoint.huggingface.settings import Architecture, Both, Key, Like, Only, Ours, Settings, Table
from teratron.config import ModelConfig, UserError

_PROJECTIONS = {"q_a_proj": "q_down", "q_a_layernorm": "q_down_norm", "kv_a_layernorm": "kv_down_norm", "kv_b_proj": "kv_up"}
_LATENT: Table = {
    **OUTSIDE,
    **NORMS,
    **FEED_FORWARD,
    **EXPERTS,
    **ROUTER,
    f"{LAYER}.mlp.gate.e_score_correction_bias": "blocks.#.ffn.router.bias",
    **{f"{LAYER}.mlp.shared_experts.{name}_proj.weight": f"blocks.#.ffn.shared.{name}.weight" for name in ("gate", "up", "down")},
    **{f"{LAYER}.self_attn.{theirs}.weight": f"blocks.#.attention.{ours}.weight" for theirs, ours in _PROJECTIONS.items()},
    f"{LAYER}.self_attn.q_proj.weight": Row(("blocks.#.attention.q.weight",), NEIGHBOURS),
    f"{LAYER}.self_attn.q_b_proj.weight": Row(("blocks.#.attention.q_up.weight",), NEIGHBOURS),
    f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight": Row(
        ("blocks.#.attention.latent.weight", "blocks.#.attention.k_rotated.weight"), NEIGHBOURS
    ),
    f"{LAYER}.self_attn.o_proj.weight": "blocks.#.attention.output.weight",
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
    *SHAPE,
    UNTIED,
    SILU,
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
    {**PLAIN, "router": "sigmoid", "router_balance": "bias"},
)


def _grouped(settings: Settings) -> Ours:
    """Whether groups of experts mean anything."""
    settings.only("topk_method", "greedy", "group_limited_greedy")
    return {"router_groups": 1, "groups_per_token": 1} if settings.get("topk_method", "greedy") == "greedy" else {}


DEEPSEEK2 = Architecture(
    "deepseek_v2",
    "model.",
    bare_decoder("DeepseekV2"),
    (
        *_DEEPSEEK,
        Only("norm_topk_prob", False),
        Only("scoring_func", "softmax"),
        Both(_grouped, lambda config: {"topk_method": "greedy" if config.router_groups == 1 else "group_limited_greedy"}),
    ),
    _LATENT,
    {**PLAIN, "router": "softmax"},
)
DEEPSEEKS = (DEEPSEEK3, DEEPSEEK2)
