"""Encoders among Hugging Face's architectures: BERT, RoBERTa, Megatron-LM's BERT, which normalises first; and XLNet."""

from __future__ import annotations

from teratron.checkpoint.huggingface.decoders import ACTIVATIONS, INIT, VOCABULARY
from teratron.checkpoint.huggingface.layouts import OF_HEADS, RESHAPED, UNSQUEEZED, Row
from teratron.checkpoint.huggingface.settings import Architecture, Form, Key, Only, Ours, Setting, Table, Told


def _shape(offset: int = 0) -> tuple[Setting, ...]:
    """offset: rows of the table of positions that are not used."""
    return (
        Key("num_hidden_layers", "layers"),
        Key("hidden_size", "hidden"),
        Key("num_attention_heads", "heads"),
        Key("intermediate_size", "ffn", property="ffn_width"),
        Key("max_position_embeddings", "seq_length", property="positions", shift=offset),
        VOCABULARY,
        Key("layer_norm_eps", "norm_eps", 1e-12),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("type_vocab_size", "token_types", 2),
        INIT,
        Only("is_decoder", False),
        Only("add_cross_attention", False),
        Only("position_embedding_type", "absolute"),
        Only("tie_word_embeddings", True),
        *((Only("pad_token_id", offset - 1),) if offset else ()),
        Told("hidden_dropout_prob", "dropout"),
        Told("attention_probs_dropout_prob", "attention_dropout"),
    )


def _body(base: str, post: bool) -> Table:
    """Embeddings and blocks, whose norms lie elsewhere when they come first."""
    layer = f"{base}.encoder.layer.#"
    embeddings = (("word", "tokens"), ("position", "positions"), ("token_type", "types"))
    return {
        **{f"{base}.embeddings.{theirs}_embeddings.weight": f"embedding.{ours}.weight" for theirs, ours in embeddings},
        **({f"{base}.embeddings.LayerNorm.*": "embedding.norm.*"} if post else {f"{base}.encoder.ln.*": "head.norm.*"}),
        **{f"{layer}.attention.self.{name}.*": f"blocks.#.attention.{name[0]}.*" for name in ("query", "key", "value")},
        f"{layer}.attention.output.dense.*": "blocks.#.attention.output.*",
        f"{layer}.attention.{'output.LayerNorm' if post else 'ln'}.*": "blocks.#.attention_norm.*",
        f"{layer}.intermediate.dense.*": "blocks.#.ffn.up.*",
        f"{layer}.output.dense.*": "blocks.#.ffn.down.*",
        f"{layer}.{'output.LayerNorm' if post else 'ln'}.*": "blocks.#.ffn_norm.*",
    }


_POOLER: Table = {"bert.pooler.dense.*": "head.pooler.*"}
_MASKED: Table = {
    "cls.predictions.transform.dense.*": "head.transform.*",
    "cls.predictions.transform.LayerNorm.*": "head.transform_norm.*",
    "cls.predictions.bias": "head.output.bias",
}
_TRANSFORM: Ours = {"head_transform": True}
_CLASSES, _POOLED = {"head": "classes"}, {"head": "classes", "pooler": True}


def _berts(name: str) -> dict[str, Form]:
    """The classes that BERT's two kinds have alike."""
    sentences: Table = {**_MASKED, **_POOLER, "cls.seq_relationship.*": "head.sentence.*"}
    return {
        f"{name}ForMaskedLM": Form(_TRANSFORM, _MASKED),
        f"{name}ForPreTraining": Form({**_TRANSFORM, "pooler": True}, sentences),
        f"{name}Model": Form({"head": "none", "pooler": True}, _POOLER, bare=True),
        f"{name}ForSequenceClassification": Form(_POOLED, {**_POOLER, "classifier.*": "head.classes.*"}, labels=True),
        f"{name}ForTokenClassification": Form(_CLASSES, {"classifier.*": "head.classes.*"}, labels=True),
        f"{name}ForQuestionAnswering": Form(_CLASSES, {"qa_outputs.*": "head.classes.*"}, labels=True),
    }


_COPIES = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
_POST: Ours = {"family": "encoder", "norm_place": "post", "embedding_norm": True}
BERT = Architecture("bert", "bert.", _berts("Bert"), _shape(), _body("bert", True), _POST, _COPIES)
MEGATRON_BERT = Architecture(
    "megatron-bert", "bert.", _berts("MegatronBert"), _shape(), _body("bert", False), {"family": "encoder"}, _COPIES
)
ROBERTA = Architecture(
    "roberta",
    "roberta.",
    {
        "RobertaForMaskedLM": Form(
            _TRANSFORM,
            {"lm_head.dense.*": "head.transform.*", "lm_head.layer_norm.*": "head.transform_norm.*", "lm_head.bias": "head.output.bias"},
        ),
        "RobertaModel": Form({"head": "none", "pooler": True}, {"roberta.pooler.dense.*": "head.pooler.*"}, bare=True),
        "RobertaForSequenceClassification": Form(
            _POOLED, {"classifier.dense.*": "head.pooler.*", "classifier.out_proj.*": "head.classes.*"}, labels=True
        ),
        "RobertaForTokenClassification": Form(_CLASSES, {"classifier.*": "head.classes.*"}, labels=True),
        "RobertaForQuestionAnswering": Form(_CLASSES, {"qa_outputs.*": "head.classes.*"}, labels=True),
    },
    _shape(2),
    _body("roberta", True),
    {**_POST, "position_offset": 2},
    ("lm_head.decoder.weight", "lm_head.decoder.bias"),
)

_XLNET = "transformer.layer.#"
_RELATIVE = f"{_XLNET}.rel_attn"
XLNET = Architecture(
    "xlnet",
    "transformer.",
    {"XLNetLMHeadModel": Form()},
    (
        Key("n_layer", "layers"),
        Key("d_model", "hidden"),
        Key("n_head", "heads"),
        Key("d_inner", "ffn", property="ffn_width"),
        VOCABULARY,
        Key("layer_norm_eps", "norm_eps", 1e-12),
        Key("ff_activation", "activation", "gelu", ACTIVATIONS),
        INIT,
        Only("attn_type", "bi"),
        Only("bi_data", False),
        Only("clamp_len", -1),
        Only("same_length", False),
        Only("tie_word_embeddings", True),
        Told("dropout", "dropout"),
    ),
    {
        "transformer.word_embedding.weight": "embedding.tokens.weight",
        "transformer.mask_emb": Row(("embedding.query.weight",), UNSQUEEZED),
        **{f"{_RELATIVE}.{name}": Row((f"blocks.#.attention.{name}.weight",), RESHAPED) for name in "qkv"},
        f"{_RELATIVE}.r": Row(("blocks.#.attention.distance.weight",), RESHAPED),
        f"{_RELATIVE}.o": Row(("blocks.#.attention.output.weight",), OF_HEADS),
        f"{_RELATIVE}.r_w_bias": Row(("blocks.#.attention.content_bias.weight",), OF_HEADS),
        f"{_RELATIVE}.r_r_bias": Row(("blocks.#.attention.distance_bias.weight",), OF_HEADS),
        f"{_RELATIVE}.layer_norm.*": "blocks.#.attention_norm.*",
        f"{_XLNET}.ff.layer_norm.*": "blocks.#.ffn_norm.*",
        f"{_XLNET}.ff.layer_1.*": "blocks.#.ffn.up.*",
        f"{_XLNET}.ff.layer_2.*": "blocks.#.ffn.down.*",
        "lm_loss.bias": "head.output.bias",
    },
    {"family": "xlnet", "position": "transformer_xl", "norm_place": "post"},
    ("lm_loss.weight",),
    {
        f"{_RELATIVE}.seg_embed": lambda config: (2, config.heads, config.head_features),
        f"{_RELATIVE}.r_s_bias": lambda config: (config.heads, config.head_features),
    },
)
ENCODERS = (BERT, ROBERTA, MEGATRON_BERT, XLNET)
