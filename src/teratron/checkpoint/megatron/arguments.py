"""Megatron-LM's arguments and the keys of a model here: read from the `args` of a checkpoint or a launch script, and written back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from teratron.checkpoint.megatron.arithmetic import evaluate
from teratron.checkpoint.megatron.pickles import Global, Record
from teratron.config import ModelConfig, UserError

Kind = Literal["gpt", "bert", "t5"]

DEFAULTS: Mapping[str, Any] = {
    "hidden_dropout": 0.1, "attention_dropout": 0.1, "init_method_std": 0.02, "norm_epsilon": 1e-5, "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute", "rotary_base": 10000, "rotary_percent": 1.0, "add_bias_linear": True,
    "bias_gelu_fusion": True, "make_vocab_size_divisible_by": 128, "moe_router_topk": 2, "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0, "moe_router_bias_update_rate": 1e-3, "moe_layer_freq": 1,
    "rope_scaling_factor": 8.0, "bert_binary_head": True, "num_query_groups": 1, "kv_lora_rank": 32, "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "weight_decay": 0.01, "clip_grad": 1.0, "lr_decay_style": "linear",
    "min_lr": 0.0, "optimizer": "adam", "seed": 1234, "eval_interval": 1000, "eval_iters": 100, "split": "969, 30, 1",
    "data_parallel_size": 1, "mask_prob": 0.15, "recompute_num_layers": 1, "cp_comm_type": "p2p", "lr_wsd_decay_style": "exponential",
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1, "expert_model_parallel_size": 1,
    "initial_loss_scale": 2**32, "min_loss_scale": 1.0, "loss_scale_window": 1000, "hysteresis": 2, "weight_decay_incr_style": "constant",
    "sgd_momentum": 0.9, "muon_momentum": 0.95, "label_smoothing": 0.0,
}  # fmt: skip
"""What Megatron-LM takes where an argument is not given, as far as it matters here; others are off, 0 or empty."""
ABSENT: Mapping[str, str] = {
    "apply_layernorm_1p": "norms hold their weights as they are: add 1 to them, and leave the flag out",
    "rotary_interleaved": "halves of a head's features are rotated, not neighbours",
    "squared_relu": "activations are gelu, relu, swiglu and geglu",
    "quick_gelu": "activations are gelu, relu, swiglu and geglu",
    "moe_shared_expert_gate": "shared experts have no gate",
    "moe_input_jitter_eps": "routers add no noise",
    "mtp_num_layers": "further tokens are predicted by parallel heads, model.predict_tokens, which are another model",
    "hybrid_layer_pattern": "layers are attention and feed-forward layers",
    "hybrid_override_pattern": "layers are attention and feed-forward layers",
    "is_hybrid_model": "layers are attention and feed-forward layers",
    "experimental_attention_variant": "attention is softmax attention",
    "linear_attention_freq": "attention is softmax attention",
    "attention_output_gate": "attention has no output gate",
    "window_attn_skip_freq": "every so many-th layer attends over all tokens: model.global_every",
    "heterogeneous_layers_config_path": "all layers have one shape",
    "no_rope_freq": "all layers have the same positions",
    "retro_project_dir": "there is no retrieval",
    "num_channels": "there are no images",
    "use_mup": "give model.mup_base the width at which the rates were found",
    "apply_residual_connection_post_layernorm": "residuals are taken before the norm: model.norm_place = pre",
    "moe_use_legacy_grouped_gemm": "save with --moe-grouped-gemm or without",
    "yarn": "set model.rope_scaling = yarn by hand",
}
"""Arguments that make another model than can be expressed here, and what to do."""


class Given:
    """Arguments by name, Megatron-LM's defaults for those that are absent."""

    def __init__(self, values: Mapping[str, Any], kind: Kind = "gpt") -> None:
        self.values, self.kind = values, kind
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """A value; None where there is neither that nor a default."""
        self.read.add(name)
        value = self.values.get(name)
        return DEFAULTS.get(name) if value is None else value

    def number(self, name: str) -> int:
        """A whole number that must be there."""
        value = self[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{flag(name)} = {value!r}: expected a whole number of at least 1")
        return value

    def choose(self, name: str, choices: Mapping[str, Any]) -> Any:
        """What a value is called here."""
        found = plain(self[name])
        if found not in choices:
            raise UserError(f"{flag(name)} = {found} cannot be expressed here, expected {' or '.join(choices)}")
        return choices[found]


def flag(name: str) -> str:
    """An argument as it is typed."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> str:
    """A value as text; of a member of an enum its name or number."""
    if isinstance(value, Record):
        return str(value.arguments[0]) if value.arguments else value.name
    return value.name.rpartition(".")[2] if isinstance(value, Global) else str(value)


def model_keys(given: Given) -> dict[str, Any]:
    """The `model.*` keys, without their section. Raises `UserError` that names the argument which cannot be expressed."""
    refuse_absent(given)
    keys = _sizes(given) | _norms(given) | _positions(given)
    keys |= {"dropout": given["hidden_dropout"], "attention_dropout": given["attention_dropout"], "init_std": given["init_method_std"]}
    keys |= _FAMILIES[given.kind](given)
    if given["multi_latent_attention"]:
        keys |= _latent(given)
    return keys | (_experts(given, keys) if given["num_experts"] else {})


def refuse_absent(given: Given) -> None:
    """Refuse what makes another model."""
    for name, instead in ABSENT.items():
        value = given[name]
        if value not in (None, False, 0, "", [], 0.0):
            raise UserError(f"{flag(name)} = {plain(value)} cannot be expressed here: {instead}")


def _sizes(given: Given) -> dict[str, Any]:
    hidden, heads = given.number("hidden_size"), given.number("num_attention_heads")
    layers = given.number("encoder_num_layers" if given["num_layers"] is None and given["encoder_num_layers"] else "num_layers")
    keys: dict[str, Any] = {"layers": layers, "hidden": hidden, "heads": heads}
    width = given["kv_channels"] or hidden // heads
    if width * heads != hidden:
        keys["head_dim"] = width
    if given["group_query_attention"]:
        keys["kv_heads"] = given.number("num_query_groups")
    gated = bool(given["swiglu"])
    ffn = given["ffn_hidden_size"] or (int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    keys |= {"ffn": ffn} if ffn != 4 * hidden else {}
    length = given["seq_length"] or given["encoder_seq_length"] or given["max_position_embeddings"]
    if not length:
        raise UserError("--seq-length is missing: expected the tokens of a sample")
    keys["seq_length"] = int(length)
    longest = given["max_position_embeddings"] or length
    keys |= {"max_positions": longest} if longest != length else {}
    vocab = given["vocab_size"] or given["padded_vocab_size"]
    keys |= {"vocab_size": vocab} if vocab else {}
    return keys | {
        "vocab_multiple": given["make_vocab_size_divisible_by"],
        "tie_embeddings": not given["untie_embeddings_and_output_weights"],
    }


def _norms(given: Given) -> dict[str, Any]:
    """Norms, biases and the activation."""
    norm = given.choose("normalization", {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"})
    bias = bool(given["add_bias_linear"]) and not given["disable_bias_linear"]
    if norm == "layernorm" and not bias:
        raise UserError(
            "--disable-bias-linear with --normalization LayerNorm, whose norms keep biases, cannot be expressed here: use RMSNorm"
        )
    keys = {
        "norm": norm,
        "norm_eps": given["norm_epsilon"] if given["layernorm_epsilon"] is None else given["layernorm_epsilon"],
        "bias": bias,
    }
    if given["add_qkv_bias"] and not bias:
        keys["qkv_bias"] = True
    if given["qk_layernorm"]:
        if norm != "rmsnorm":
            raise UserError("--qk-layernorm with --normalization LayerNorm cannot be expressed here: model.qk_norm is an RMSNorm")
        keys["qk_norm"] = True
    tanh = given["openai_gelu"] or (bias and given["bias_gelu_fusion"])
    return keys | {"activation": "swiglu" if given["swiglu"] else "gelu_tanh" if tanh else "gelu"}


def _positions(given: Given) -> dict[str, Any]:
    kinds = {"learned_absolute": "learned", "rope": "rope", "none": "none", "relative": "relative"}
    kind = "rope" if given["use_rotary_position_embeddings"] else given.choose("position_embedding_type", kinds)
    keys: dict[str, Any] = {"position": kind}
    if kind == "relative":
        keys |= {"relative_buckets": given["relative_attention_num_buckets"], "relative_distance": given["relative_attention_max_distance"]}
    if kind == "rope":
        keys["rope_theta"] = float(given["rotary_base"])
        if given["rotary_percent"] != 1:
            keys["rope_share"] = given["rotary_percent"]
        if given["use_rope_scaling"]:
            keys |= {"rope_scaling": "llama3", "rope_factor": given["rope_scaling_factor"], "rope_original": 8192}
        elif (given["rotary_seq_len_interpolation_factor"] or 1) != 1:
            keys |= {"rope_scaling": "linear", "rope_factor": float(given["rotary_seq_len_interpolation_factor"])}
    window = given["window_size"]
    if window:
        reach = window[0] if isinstance(window, (list, tuple)) else int(str(window).strip("() ").split(",")[0])
        keys["window"] = reach + 1  # theirs leaves out the token itself
    return keys


def _gpt(given: Given) -> dict[str, Any]:
    return {"family": "gpt"}


def _bert(given: Given) -> dict[str, Any]:
    return {"family": "encoder", "token_types": 2, "head_transform": True, "pooler": bool(given["bert_binary_head"])}


def _t5(given: Given) -> dict[str, Any]:
    decoder = given["decoder_num_layers"] or given["num_layers"] or given["encoder_num_layers"]
    if decoder != (given["encoder_num_layers"] or given["num_layers"]):
        raise UserError(f"--decoder-num-layers = {decoder} differs from the encoder's, which cannot be expressed here: choose one number")
    return {"family": "encoder_decoder"}


_FAMILIES: Mapping[Kind, Callable[[Given], dict[str, Any]]] = {"gpt": _gpt, "bert": _bert, "t5": _t5}


def _latent(given: Given) -> dict[str, Any]:
    keys = {"latent": given["kv_lora_rank"], "head_dim": given["qk_head_dim"], "rope_dim": given["qk_pos_emb_head_dim"], "kv_heads": 0}
    keys |= {"value_dim": given["v_head_dim"]} if given["v_head_dim"] != given["qk_head_dim"] else {}
    return keys | ({"latent_query": given["q_lora_rank"]} if given["q_lora_rank"] else {})


def _experts(given: Given, keys: Mapping[str, Any]) -> dict[str, Any]:
    if keys["bias"]:
        raise UserError("--num-experts with biases in linear layers cannot be expressed here: experts have none: add --disable-bias-linear")
    score, chosen = given["moe_router_score_function"], given["moe_router_topk"]
    width = given["moe_ffn_hidden_size"] or keys.get("ffn", 4 * keys["hidden"])
    found = {"experts": given.number("num_experts"), "experts_per_token": chosen, "router": score, **_routed_layers(given, keys["layers"])}
    found |= {"expert_ffn": width} if width != keys.get("ffn", 4 * keys["hidden"]) else {}
    found["normalise_gates"] = chosen > 1 and (score == "sigmoid" or not given["moe_router_pre_softmax"])
    shared = given["moe_shared_expert_intermediate_size"]
    if shared and shared % width:
        raise UserError(
            f"--moe-shared-expert-intermediate-size = {shared} is no multiple of one expert's {width} features: shared experts here are "
            "as wide as the others"
        )
    found |= {"shared_experts": shared // width} if shared else {}
    found |= {"gate_scale": given["moe_router_topk_scaling_factor"]} if given["moe_router_topk_scaling_factor"] else {}
    found |= {"router_groups": given["moe_router_num_groups"]} if given["moe_router_num_groups"] else {}
    found |= {"groups_per_token": given["moe_router_group_topk"]} if given["moe_router_group_topk"] else {}
    return found | _balance(given)


def _balance(given: Given) -> dict[str, Any]:
    """How experts are kept evenly loaded."""
    kind = given["moe_router_load_balancing_type"]
    kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    weight = given["moe_aux_loss_coeff"]
    weight = weight[0] if isinstance(weight, list) and len(weight) == 1 else weight
    if kind not in ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"):
        raise UserError(f"--moe-router-load-balancing-type = {kind} cannot be expressed here, expected aux_loss or none")
    keys: dict[str, Any] = {"router_balance": "none"}
    if given["moe_router_enable_expert_bias"]:
        keys = {"router_balance": "bias", "bias_rate": given["moe_router_bias_update_rate"]}
    elif kind != "none" and weight:
        keys = {"router_balance": "aux", "aux_loss": weight}
    keys |= {"z_loss": given["moe_z_loss_coeff"]} if given["moe_z_loss_coeff"] else {}
    return keys | ({"capacity": given["moe_expert_capacity_factor"]} if given["moe_expert_capacity_factor"] else {})


def _routed_layers(given: Given, layers: int) -> dict[str, Any]:
    """Which layers have experts, from a number or a pattern of zeros and ones."""
    found = given["moe_layer_freq"]
    if isinstance(found, str):
        try:
            found = evaluate(found)
        except ValueError:
            raise UserError(f"--moe-layer-freq = {found}: expected a number, or a list such as ([0]*3+[1]*21)") from None
    if isinstance(found, int):
        return {"moe_every": found} if found != 1 else {}
    first = next((place for place, one in enumerate(found) if one), layers)
    rest = found[first:]
    every = next((place for place, one in enumerate(rest) if one and place), 1)
    if len(found) != layers or [int(place % every == 0) for place in range(len(rest))] != list(rest):
        raise UserError(
            f"--moe-layer-freq = {found} cannot be expressed here: expected dense layers first, then every so many-th with experts"
        )
    return {"moe_first_dense": first} | ({"moe_every": every} if every != 1 else {})


def arguments_of_model(model: ModelConfig, padded_vocab: int) -> dict[str, Any]:
    """The arguments that make a model in Megatron-LM. Raises `UserError` that names the key which it cannot express."""
    check_expressible(model)
    args: dict[str, Any] = {
        "num_layers": model.layers, "encoder_num_layers": model.layers, "hidden_size": model.hidden, "num_attention_heads": model.heads,
        "kv_channels": model.head_features, "ffn_hidden_size": model.ffn_width, "seq_length": model.seq_length,
        "encoder_seq_length": model.seq_length, "max_position_embeddings": model.positions, "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocab, "make_vocab_size_divisible_by": model.vocab_multiple,
        "untie_embeddings_and_output_weights": not model.tie_embeddings, "group_query_attention": model.key_value_heads != model.heads,
        "num_query_groups": model.key_value_heads, "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm],
        "norm_epsilon": model.norm_eps, "layernorm_epsilon": model.norm_eps, "add_bias_linear": model.bias, "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm, "swiglu": model.activation == "swiglu", "openai_gelu": model.activation == "gelu_tanh",
        "bias_gelu_fusion": False, "position_embedding_type": {"learned": "learned_absolute"}.get(model.position, model.position),
        "rotary_base": model.rope_theta, "rotary_percent": model.rope_share, "use_rope_scaling": model.rope_scaling == "llama3",
        "rope_scaling_factor": model.rope_factor, "rotary_interleaved": False, "apply_layernorm_1p": False,
        "rotary_seq_len_interpolation_factor": model.rope_factor if model.rope_scaling == "linear" else None,
        "window_size": (model.window - 1, 0) if model.window else None, "hidden_dropout": model.dropout,
        "attention_dropout": model.attention_dropout, "init_method_std": model.init_std, "bert_binary_head": model.pooler,
        "transformer_impl": "transformer_engine", "params_dtype": None,
    }  # fmt: skip
    return args | (_arguments_of_experts(model) if model.experts else {})


def _arguments_of_experts(model: ModelConfig) -> dict[str, Any]:
    routed = [int(model.routed(layer)) for layer in range(model.layers)]
    return {
        "num_experts": model.experts, "moe_router_topk": model.experts_per_token, "moe_ffn_hidden_size": model.expert_width,
        "moe_layer_freq": 1 if all(routed) else routed, "moe_router_score_function": model.router,
        "moe_router_pre_softmax": not model.normalise_gates,
        "moe_router_topk_scaling_factor": None if model.gate_scale == 1 else model.gate_scale,
        "moe_shared_expert_intermediate_size": model.shared_experts * model.expert_width or None,
        "moe_router_load_balancing_type": "aux_loss" if model.router_balance == "aux" else "none",
        "moe_aux_loss_coeff": model.aux_loss if model.router_balance == "aux" else 0.0, "moe_z_loss_coeff": model.z_loss or None,
        "moe_router_enable_expert_bias": model.router_balance == "bias", "moe_router_bias_update_rate": model.bias_rate,
        "moe_expert_capacity_factor": model.capacity or None,
        "moe_router_num_groups": model.router_groups if model.router_groups > 1 else None,
        "moe_router_group_topk": model.groups_per_token if model.router_groups > 1 else None,
    }  # fmt: skip


_ELSEWHERE: Mapping[str, tuple[Any, ...]] = {
    "family": ("gpt", "encoder"), "norm_place": ("pre",), "block": ("sequential",), "activation": ("gelu", "gelu_tanh", "swiglu"),
    "position": ("learned", "rope", "none"), "position_offset": (0,), "embedding_norm": (False,), "scale_embeddings": (False,),
    "output_cap": (0.0,), "attention_cap": (0.0,), "scale_output": (False,), "scale_attention": (True,), "predict_tokens": (1,),
    "pattern": ("window",), "dilation": (1,), "global_tokens": (0,), "global_every": (0,), "latent": (0,), "mup_base": (0,),
    "rope_scaling": ("none", "llama3", "linear"), "recurrence": (0,),
}  # fmt: skip
"""The values of keys of a model that Megatron-LM has, in its checkpoints, too."""


def check_expressible(model: ModelConfig) -> None:
    """Refuse a model that Megatron-LM's checkpoints do not hold."""
    for name, values in _ELSEWHERE.items():
        found = getattr(model, name)
        if found not in values:
            raise UserError(f"model.{name} = {found} cannot be exchanged with Megatron-LM, expected {' or '.join(map(str, values))}")
    if model.rope_scaling == "llama3" and (model.rope_original, model.rope_slow, model.rope_fast or 4) != (8192, 1, 4):
        raise UserError(
            f"model.rope_original = {model.rope_original} cannot be exchanged with Megatron-LM, expected 8192, slow 1 and fast 4"
        )
    if model.norm == "layernorm" and not model.bias:
        raise UserError("model.bias = false with model.norm = layernorm cannot be exchanged with Megatron-LM, whose norms keep biases")
    if model.qk_norm and model.norm != "rmsnorm":
        raise UserError(
            "model.qk_norm = true with model.norm = layernorm cannot be exchanged with Megatron-LM: its head norms are LayerNorms"
        )
    if model.family == "encoder" and (model.token_types != 2 or not model.head_transform or not model.tie_embeddings):
        raise UserError(
            "model.family = encoder is exchanged with Megatron-LM with token_types = 2, head_transform and tied embeddings only"
        )
    if model.family == "gpt" and (model.token_types or model.head_transform or model.pooler):
        raise UserError(
            "model.family = gpt with token_types, head_transform or pooler cannot be exchanged with Megatron-LM: leave them out"
        )
