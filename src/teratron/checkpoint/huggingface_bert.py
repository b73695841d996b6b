"""The kinds of BERT among Hugging Face's architectures: BERT, RoBERTa, and Megatron-LM's BERT, which normalises first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from teratron.checkpoint.architecture import Architecture, Settings, Source
from teratron.config import ModelConfig

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_KINDS = ("weight", "bias")


def _config(settings: Settings, offset: int = 0, norm_place: str = "post", pooler: bool = False) -> ModelConfig:
    settings.only("is_decoder", False)
    settings.only("add_cross_attention", False)
    settings.only("position_embedding_type", "absolute")
    settings.only("quantization_config", None)
    settings.only("tie_word_embeddings", True)
    if offset:
        settings.only("pad_token_id", offset - 1)
    return ModelConfig(
        family="encoder",
        layers=settings.get("num_hidden_layers"),
        hidden=settings.get("hidden_size"),
        heads=settings.get("num_attention_heads"),
        ffn=settings.get("intermediate_size"),
        seq_length=settings.get("max_position_embeddings") - offset,
        vocab_size=settings.get("vocab_size"),
        norm_eps=settings.get("layer_norm_eps", 1e-12),
        norm_place=norm_place,  # type: ignore[arg-type]
        activation=settings.choose("hidden_act", "gelu", _ACTIVATIONS),
        position_offset=offset,
        token_types=settings.get("type_vocab_size", 2),
        embedding_norm=norm_place == "post",
        head_transform=True,
        pooler=pooler,
        init_std=settings.get("initializer_range", 0.02),
    )


def _bert_sources(config: ModelConfig) -> Iterator[Source]:
    yield from _body(config)
    head = "cls.predictions"
    yield from _both(f"{head}.transform.dense", "head.transform")
    yield from _both(f"{head}.transform.LayerNorm", "head.transform_norm")
    yield Source(f"{head}.bias", ("head.output.bias",))
    if config.pooler:
        yield from _both("pooler.dense", "head.pooler")
        yield from _both("cls.seq_relationship", "head.sentence")


def _roberta_sources(config: ModelConfig) -> Iterator[Source]:
    yield from _body(config)
    yield from _both("lm_head.dense", "head.transform")
    yield from _both("lm_head.layer_norm", "head.transform_norm")
    yield Source("lm_head.bias", ("head.output.bias",))


def _body(config: ModelConfig) -> Iterator[Source]:
    """Embeddings and blocks, whose norms lie elsewhere when they come first."""
    post = config.norm_place == "post"
    for theirs, ours in (("word", "tokens"), ("position", "positions"), ("token_type", "types")):
        yield Source(f"embeddings.{theirs}_embeddings.weight", (f"embedding.{ours}.weight",))
    yield from _both("embeddings.LayerNorm", "embedding.norm") if post else _both("encoder.ln", "head.norm")
    for layer in range(config.layers):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        for name, part in (("query", "q"), ("key", "k"), ("value", "v")):
            yield from _both(f"{theirs}.attention.self.{name}", f"{ours}.attention.{part}")
        yield from _both(f"{theirs}.attention.output.dense", f"{ours}.attention.output")
        yield from _both(f"{theirs}.attention.{'output.LayerNorm' if post else 'ln'}", f"{ours}.attention_norm")
        yield from _both(f"{theirs}.intermediate.dense", f"{ours}.ffn.up")
        yield from _both(f"{theirs}.output.dense", f"{ours}.ffn.down")
        yield from _both(f"{theirs}.{'output.LayerNorm' if post else 'ln'}", f"{ours}.ffn_norm")


def _both(theirs: str, ours: str) -> Iterator[Source]:
    return (Source(f"{theirs}.{kind}", (f"{ours}.{kind}",)) for kind in _KINDS)


_BERT_TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
_megatron = partial(_config, norm_place="pre")
BERTS = {
    "BertForPreTraining": Architecture("bert", "bert.", partial(_config, pooler=True), _bert_sources, _BERT_TIED),
    "BertForMaskedLM": Architecture("bert-masked", "bert.", _config, _bert_sources, _BERT_TIED),
    "MegatronBertForPreTraining": Architecture("megatron-bert", "bert.", partial(_megatron, pooler=True), _bert_sources, _BERT_TIED),
    "MegatronBertForMaskedLM": Architecture("megatron-bert-masked", "bert.", _megatron, _bert_sources, _BERT_TIED),
    "RobertaForMaskedLM": Architecture(
        "roberta", "roberta.", partial(_config, offset=2), _roberta_sources, ("lm_head.decoder.weight", "lm_head.decoder.bias")
    ),
}
