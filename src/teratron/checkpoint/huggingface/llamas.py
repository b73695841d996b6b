"""Decoders with rotary positions: Llama, Mistral, Mixtral, Qwen; and Cohere."""

from __future__ import annotations

import json

from teratron.checkpoint.huggingface.decoders import INIT, VOCABULARY, decoder
from teratron.checkpoint.huggingface.layouts import NEIGHBOURS, STACKED, Row
from teratron.checkpoint.huggingface.rotary import rope
from teratron.checkpoint.huggingface.settings import Architecture, Both, Form, Key, Like, Only, Ours, Setting, Settings, Table, Told
from teratron.config import UserError

LAYER = "model.layers.#"
RMS_EPS = Key("rms_norm_eps", "norm_eps", 1e-6)
SHAPE: tuple[Setting, ...] = (
    Key("num_hidden_layers", "layers"),
    Key("hidden_size", "hidden"),
    Key("num_attention_heads", "heads"),
    Key("intermediate_size", "ffn", property="ffn_width"),
    Key("max_position_embeddings", "seq_length", property="positions"),
    VOCABULARY,
    RMS_EPS,
    INIT,
    Told("attention_dropout", "attention_dropout"),
)
GROUPED = Key("num_key_value_heads", "kv_heads", 0, property="key_value_heads")
UNTIED = Key("tie_word_embeddings", "tie_embeddings", False)
SILU = Key("hidden_act", "activation", "silu", {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "swish": "swiglu"})
_HEAD = Key("head_dim", "head_dim", 0, property="head_features")
_IMPLIED: Ours = {"norm": "rmsnorm", "position": "rope"}
PLAIN: Ours = {**_IMPLIED, "bias": False}

OUTSIDE: Table = {
    "model.embed_tokens.weight": "embedding.tokens.weight",
    "model.norm.weight": "head.norm.weight",
    "lm_head.weight": "head.output.weight",
}
ATTENTION: Table = {
    **{f"{LAYER}.self_attn.{name}_proj.*": f"blocks.#.attention.{name}.*" for name in "qkv"},
    f"{LAYER}.self_attn.o_proj.*": "blocks.#.attention.output.*",
    **{f"{LAYER}.self_attn.{name}_norm.weight": f"blocks.#.attention.{name}_norm.weight" for name in "qk"},
}
NORMS: Table = {
    f"{LAYER}.input_layernorm.weight": "blocks.#.attention_norm.weight",
    f"{LAYER}.post_attention_layernorm.weight": "blocks.#.ffn_norm.weight",
}
FEED_FORWARD: Table = {f"{LAYER}.mlp.{name}_proj.*": f"blocks.#.ffn.{name}.*" for name in ("gate", "up", "down")}
LLAMA_TABLE: Table = {**OUTSIDE, **ATTENTION, **NORMS, **FEED_FORWARD}


def _experts(place: str, names: dict[str, str]) -> Table:
    return {f"{LAYER}.{place}.@.{theirs}.weight": Row((f"blocks.#.ffn.experts.{ours}.weight",), STACKED) for theirs, ours in names.items()}


EXPERTS = _experts("mlp.experts", {f"{name}_proj": name for name in ("gate", "up", "down")})
ROUTER: Table = {f"{LAYER}.mlp.gate.weight": "blocks.#.ffn.router.weight"}


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
    (*SHAPE, GROUPED, _HEAD, UNTIED, SILU, rope(), Key("attention_bias", "bias", False), Like("mlp_bias", "attention_bias", False)),
    LLAMA_TABLE,
    _IMPLIED,
)
MISTRAL = Architecture(
    "mistral", "model.", decoder("Mistral", "score"), (*SHAPE, GROUPED, _HEAD, UNTIED, SILU, rope(), _window(4096)), LLAMA_TABLE, PLAIN
)
QWEN2 = Architecture(
    "qwen2", "model.", decoder("Qwen2", "score"), (*SHAPE, GROUPED, _HEAD, UNTIED, SILU, rope(), *_FULL), LLAMA_TABLE,
    {**PLAIN, "qkv_bias": True},
)  # fmt: skip
_QWEN3 = (GROUPED, Key("head_dim", "head_dim", 128, property="head_features"), UNTIED, SILU, rope(), Only("attention_bias", False))
QWEN3 = Architecture(
    "qwen3", "model.", decoder("Qwen3", "score"), (*SHAPE, *_QWEN3, *_FULL), LLAMA_TABLE, {**PLAIN, "qk_norm": True}
)  # fmt: skip
QWEN3_MOE = Architecture(
    "qwen3_moe",
    "model.",
    decoder("Qwen3Moe", "score"),
    (
        *SHAPE,
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
    {**LLAMA_TABLE, **EXPERTS, **ROUTER},
    {**PLAIN, "qk_norm": True},
)
MIXTRAL = Architecture(
    "mixtral",
    "model.",
    decoder("Mixtral", "score"),
    (
        *SHAPE, GROUPED, _HEAD, UNTIED, SILU, rope(1e6), _window(None),
        Key("num_local_experts", "experts", 8),
        Key("num_experts_per_tok", "experts_per_token", 2),
        Key("router_aux_loss_coef", "aux_loss", 0.001),
    ),
    {
        **OUTSIDE, **ATTENTION, **NORMS,
        **_experts("block_sparse_moe.experts", {"w1": "gate", "w2": "down", "w3": "up"}),
        f"{LAYER}.block_sparse_moe.gate.weight": "blocks.#.ffn.router.weight",
    },
    {**PLAIN, "normalise_gates": True},
)  # fmt: skip

_NEIGHBOURS = {f"{LAYER}.self_attn.{name}_proj.weight": Row((f"blocks.#.attention.{name}.weight",), NEIGHBOURS) for name in "qk"}
COHERE = Architecture(
    "cohere",
    "model.",
    {"CohereForCausalLM": Form()},
    (
        *(setting for setting in SHAPE if setting != RMS_EPS),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        GROUPED,
        Key("tie_word_embeddings", "tie_embeddings", True),
        SILU,
        rope(),
        Key("logit_scale", "logit_scale", 0.0625),
        Only("use_qk_norm", False),
        Only("attention_bias", False),
    ),
    {**_NEIGHBOURS, **LLAMA_TABLE},
    {"position": "rope", "bias": False, "block": "parallel_one_norm"},
)
LLAMAS = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, COHERE)
