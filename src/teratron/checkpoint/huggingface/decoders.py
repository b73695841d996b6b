"""Decoders with LayerNorm among Hugging Face's architectures: GPT-2, GPT-NeoX, BLOOM."""

from __future__ import annotations

from teratron.checkpoint.huggingface.layouts import EACH_HEAD, TRANSPOSED, Row
from teratron.checkpoint.huggingface.rotary import rope
from teratron.checkpoint.huggingface.settings import Architecture, Both, Form, Key, Only, Told

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
VOCABULARY = Key("vocab_size", "vocab_size")
INIT = Key("initializer_range", "init_std", 0.02)


def parts(name: str, *which: str) -> tuple[str, ...]:
    """`blocks.#.attention.q.*` and so on."""
    return tuple(f"{name}.{part}.*" for part in which)


def decoder(name: str, classes: str = "classifier") -> dict[str, Form]:
    """The classes of a decoder; classes: their name of the layer that scores the classes of tokens."""
    tokens = Form({"head": "classes"}, {f"{classes}.*": "head.classes.*"}, labels=True)
    texts = Form({"head": "classes", "class_bias": False}, {"score.weight": "head.classes.weight"}, labels=True)
    return {**bare_decoder(name), f"{name}ForTokenClassification": tokens, f"{name}ForSequenceClassification": texts}


def bare_decoder(name: str) -> dict[str, Form]:
    """Those that every decoder has."""
    return {f"{name}ForCausalLM": Form(), f"{name}Model": Form({"head": "none"}, bare=True)}


_ATTENTION = parts("blocks.#.attention", "q", "k", "v")
_GPT2_FORMS = decoder("GPT2")
GPT2 = Architecture(
    "gpt2",
    "transformer.",
    {"GPT2LMHeadModel": Form(), **{name: form for name, form in _GPT2_FORMS.items() if name != "GPT2ForCausalLM"}},
    (
        Key("n_layer", "layers"),
        Key("n_embd", "hidden"),
        Key("n_head", "heads"),
        Both(lambda settings: {"ffn": settings.get("n_inner", 0)}, lambda config: {"n_inner": config.ffn or None}),
        Key("n_positions", "seq_length", property="positions"),
        VOCABULARY,
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Key("tie_word_embeddings", "tie_embeddings", True),
        INIT,
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
        *(Told(key, "dropout") for key in ("embd_pdrop", "resid_pdrop")),
        Told("attn_pdrop", "attention_dropout"),
    ),
    {
        "transformer.wte.weight": "embedding.tokens.weight",
        "transformer.wpe.weight": "embedding.positions.weight",
        "transformer.h.#.ln_1.*": "blocks.#.attention_norm.*",
        "transformer.h.#.attn.c_attn.*": Row(_ATTENTION, TRANSPOSED),
        "transformer.h.#.attn.c_proj.*": Row(("blocks.#.attention.output.*",), TRANSPOSED),
        "transformer.h.#.ln_2.*": "blocks.#.ffn_norm.*",
        "transformer.h.#.mlp.c_fc.*": Row(("blocks.#.ffn.up.*",), TRANSPOSED),
        "transformer.h.#.mlp.c_proj.*": Row(("blocks.#.ffn.down.*",), TRANSPOSED),
        "transformer.ln_f.*": "head.norm.*",
        "lm_head.weight": "head.output.weight",
    },
)
NEOX = Architecture(
    "gpt_neox",
    "gpt_neox.",
    decoder("GPTNeoX"),
    (
        Key("num_hidden_layers", "layers"),
        Key("hidden_size", "hidden"),
        Key("num_attention_heads", "heads"),
        Key("intermediate_size", "ffn", property="ffn_width"),
        Key("max_position_embeddings", "seq_length", 2048, property="positions"),
        VOCABULARY,
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("hidden_act", "activation", "gelu", {**ACTIVATIONS, "gelu_fast": "gelu_tanh"}),
        Key("use_parallel_residual", "block", True, {True: "parallel", False: "sequential"}),
        Key("tie_word_embeddings", "tie_embeddings", False),
        INIT,
        rope(share="rotary_pct"),
        Only("attention_bias", True),
        Told("hidden_dropout", "dropout"),
        Told("attention_dropout", "attention_dropout"),
    ),
    {
        "gpt_neox.embed_in.weight": "embedding.tokens.weight",
        "gpt_neox.layers.#.input_layernorm.*": "blocks.#.attention_norm.*",
        "gpt_neox.layers.#.attention.query_key_value.*": Row(_ATTENTION, EACH_HEAD),
        "gpt_neox.layers.#.attention.dense.*": "blocks.#.attention.output.*",
        "gpt_neox.layers.#.post_attention_layernorm.*": "blocks.#.ffn_norm.*",
        "gpt_neox.layers.#.mlp.dense_h_to_4h.*": "blocks.#.ffn.up.*",
        "gpt_neox.layers.#.mlp.dense_4h_to_h.*": "blocks.#.ffn.down.*",
        "gpt_neox.final_layer_norm.*": "head.norm.*",
        "embed_out.weight": "head.output.weight",
    },
    {"position": "rope"},
    copies=("embed_out.weight",),
)

BLOOM = Architecture(
    "bloom",
    "transformer.",
    decoder("Bloom"),
    (
        Key("n_layer", "layers", older="num_hidden_layers"),
        Key("hidden_size", "hidden", older="n_embed"),
        Key("n_head", "heads", older="num_attention_heads"),
        Key("seq_length", "seq_length", 2048, property="positions"),
        VOCABULARY,
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        INIT,
        Only("apply_residual_connection_post_layernorm", False),
        Only("tie_word_embeddings", True),
        Told("hidden_dropout", "dropout"),
        Told("attention_dropout", "attention_dropout"),
    ),
    {
        "transformer.word_embeddings.weight": "embedding.tokens.weight",
        "transformer.word_embeddings_layernorm.*": "embedding.norm.*",
        "transformer.h.#.input_layernorm.*": "blocks.#.attention_norm.*",
        "transformer.h.#.self_attention.query_key_value.*": Row(_ATTENTION, EACH_HEAD),
        "transformer.h.#.self_attention.dense.*": "blocks.#.attention.output.*",
        "transformer.h.#.post_attention_layernorm.*": "blocks.#.ffn_norm.*",
        "transformer.h.#.mlp.dense_h_to_4h.*": "blocks.#.ffn.up.*",
        "transformer.h.#.mlp.dense_4h_to_h.*": "blocks.#.ffn.down.*",
        "transformer.ln_f.*": "head.norm.*",
    },
    {"position": "alibi", "embedding_norm": True, "activation": "gelu_tanh"},
)
DECODERS = (GPT2, NEOX, BLOOM)
