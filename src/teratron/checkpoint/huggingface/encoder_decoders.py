"""The encoder-decoders among Hugging Face's architectures: T5, its version 1.1 (and UL2), and BART."""

from __future__ import annotations

from teratron.checkpoint.huggingface.decoders import ACTIVATIONS, VOCABULARY
from teratron.checkpoint.huggingface.settings import Architecture, Both, Form, Key, Like, Only, Settings, Table, Told

_T5_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gated-gelu": "geglu_tanh", "gated-gelu_new": "geglu_tanh", "gated-silu": "swiglu"
}  # fmt: skip
_STACKS = (("encoder", "embedding", "bridge.norm"), ("decoder", "bridge.embedding", "head.norm"))
"""Each stack, what begins it here, and its last norm."""


def _t5_tied(settings: Settings) -> dict[str, bool]:
    """Newer files of version 1.1, whose head is not tied, say so by a key of their own."""
    tied = settings.get("tie_word_embeddings", True) and settings.get("scale_decoder_outputs", True)
    return {"tie_embeddings": tied, "scale_output": tied}


def _t5_table(feed_forward: dict[str, str]) -> Table:
    """feed_forward: the last layer's names."""
    table = {"shared.weight": "embedding.tokens.weight", "lm_head.weight": "head.output.weight"}
    for stack, owner, norm in _STACKS:
        block = f"{stack}.block.#.layer"
        table[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = f"{owner}.relative.weight"
        table[f"{stack}.final_layer_norm.weight"] = f"{norm}.weight"
        attentions = {"SelfAttention": "attention"} | ({"EncDecAttention": "cross_attention"} if stack == "decoder" else {})
        for place, (theirs, ours) in enumerate(attentions.items()):
            table[f"{block}.{place}.layer_norm.weight"] = f"{stack}.#.{ours}_norm.weight"
            letters = {"q": "q", "k": "k", "v": "v", "o": "output"}
            table |= {f"{block}.{place}.{theirs}.{letter}.weight": f"{stack}.#.{ours}.{leaf}.weight" for letter, leaf in letters.items()}
        last = f"{block}.{len(attentions)}"
        table[f"{last}.layer_norm.weight"] = f"{stack}.#.ffn_norm.weight"
        table |= {f"{last}.DenseReluDense.{theirs}.weight": f"{stack}.#.ffn.{ours}.weight" for theirs, ours in feed_forward.items()}
    return table


def _bart_table() -> Table:
    table = {"model.shared.weight": "embedding.tokens.weight"}
    for stack, owner, _ in _STACKS:
        block = f"model.{stack}.layers.#"
        table[f"model.{stack}.embed_positions.weight"] = f"{owner}.positions.weight"
        table[f"model.{stack}.layernorm_embedding.*"] = f"{owner}.norm.*"
        table |= {f"{block}.fc1.*": f"{stack}.#.ffn.up.*", f"{block}.fc2.*": f"{stack}.#.ffn.down.*"}
        table[f"{block}.final_layer_norm.*"] = f"{stack}.#.ffn_norm.*"
        for theirs, ours in {"self_attn": "attention", "encoder_attn": "cross_attention"}.items():
            letters = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "output"}
            table |= {f"{block}.{theirs}.{letter}.*": f"{stack}.#.{ours}.{leaf}.*" for letter, leaf in letters.items()}
            table[f"{block}.{theirs}_layer_norm.*"] = f"{stack}.#.{ours}_norm.*"
    return table


T5 = Architecture(
    "t5",
    "",
    {"T5ForConditionalGeneration": Form()},
    (
        Key("num_layers", "layers"),
        Key("d_model", "hidden"),
        Key("num_heads", "heads"),
        Key("d_kv", "head_dim", property="head_features"),
        Key("d_ff", "ffn", property="ffn_width"),
        Key("n_positions", "seq_length", 512, property="positions"),
        VOCABULARY,
        Key("layer_norm_epsilon", "norm_eps", 1e-6),
        Key("feed_forward_proj", "activation", "relu", _T5_ACTIVATIONS),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_distance", 128),
        Both(_t5_tied, lambda config: {"tie_word_embeddings": config.tie_embeddings}),
        Like("num_decoder_layers", "num_layers"),
        Told("dropout_rate", "dropout"),
    ),
    _t5_table({"wi": "up", "wo": "down"}),
    {
        "family": "encoder_decoder", "norm": "rmsnorm", "position": "relative", "scale_attention": False, "bias": False,
        "embedding_std": 1.0,
    },
    gated=_t5_table({"wi_0": "gate", "wi_1": "up", "wo": "down"}),
)  # fmt: skip
BART = Architecture(
    "bart",
    "model.",
    {"BartForConditionalGeneration": Form()},
    (
        Key("encoder_layers", "layers"),
        Key("d_model", "hidden"),
        Key("encoder_attention_heads", "heads"),
        Key("encoder_ffn_dim", "ffn", property="ffn_width"),
        Key("max_position_embeddings", "seq_length", property="positions"),
        VOCABULARY,
        Key("activation_function", "activation", "gelu", ACTIVATIONS),
        Key("init_std", "init_std", 0.02),
        Only("scale_embedding", False),
        Only("tie_word_embeddings", True),
        *(Like(f"decoder_{name}", f"encoder_{name}") for name in ("layers", "ffn_dim", "attention_heads")),
        Told("dropout", "dropout"),
        Told("attention_dropout", "attention_dropout"),
    ),
    _bart_table(),
    {"family": "encoder_decoder", "norm_place": "post", "position_offset": 2, "embedding_norm": True},
    blank={"final_logits_bias": lambda config: (1, config.vocab_size)},
)
ENCODER_DECODERS = (T5, BART)
