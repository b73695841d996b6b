"""The encoder-decoders among Hugging Face's architectures: T5, its version 1.1 (and UL2), and BART."""

from __future__ import annotations

from collections.abc import Iterator

from teratron.checkpoint.architecture import Architecture, Settings, Source
from teratron.config import ModelConfig

_T5_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gated-gelu": "geglu_tanh", "gated-gelu_new": "geglu_tanh", "gated-silu": "swiglu"
}  # fmt: skip
_BART_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


def _t5_config(settings: Settings) -> ModelConfig:
    settings.only("quantization_config", None)
    settings.only("num_decoder_layers", settings.get("num_layers"))
    # Newer files of version 1.1, whose head is not tied, say so by this key alone.
    tied = settings.get("tie_word_embeddings", True) and settings.get("scale_decoder_outputs", True)
    return ModelConfig(
        family="encoder_decoder",
        layers=settings.get("num_layers"),
        hidden=settings.get("d_model"),
        heads=settings.get("num_heads"),
        head_dim=settings.get("d_kv"),
        ffn=settings.get("d_ff"),
        seq_length=settings.get("n_positions", 512),
        vocab_size=settings.get("vocab_size"),
        norm="rmsnorm",
        norm_eps=settings.get("layer_norm_epsilon", 1e-6),
        activation=settings.choose("feed_forward_proj", "relu", _T5_ACTIVATIONS),
        position="relative",
        relative_buckets=settings.get("relative_attention_num_buckets", 32),
        relative_distance=settings.get("relative_attention_max_distance", 128),
        tie_embeddings=tied,
        scale_output=tied,
        scale_attention=False,
        bias=False,
        embedding_std=1.0,
    )


def _t5_sources(config: ModelConfig) -> Iterator[Source]:
    yield Source("shared.weight", ("embedding.tokens.weight",))
    for stack, owner, norm in (("encoder", "embedding", "bridge.norm"), ("decoder", "bridge.embedding", "head.norm")):
        yield Source(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{owner}.relative.weight",))
        for layer in range(config.layers):
            yield from _t5_block(f"{stack}.block.{layer}.layer", f"{stack}.{layer}", stack == "decoder", config.gated)
        yield Source(f"{stack}.final_layer_norm.weight", (f"{norm}.weight",))
    if not config.tie_embeddings:
        yield Source("lm_head.weight", ("head.output.weight",))


def _t5_block(theirs: str, ours: str, cross: bool, gated: bool) -> Iterator[Source]:
    attentions = [("SelfAttention", "attention"), *([("EncDecAttention", "cross_attention")] if cross else [])]
    for place, (name, part) in enumerate(attentions):
        yield Source(f"{theirs}.{place}.layer_norm.weight", (f"{ours}.{part}_norm.weight",))
        for letter, leaf in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            yield Source(f"{theirs}.{place}.{name}.{letter}.weight", (f"{ours}.{part}.{leaf}.weight",))
    last = f"{theirs}.{len(attentions)}"
    yield Source(f"{last}.layer_norm.weight", (f"{ours}.ffn_norm.weight",))
    for name, leaf in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")) if gated else (("wi", "up"), ("wo", "down")):
        yield Source(f"{last}.DenseReluDense.{name}.weight", (f"{ours}.ffn.{leaf}.weight",))


def _bart_config(settings: Settings) -> ModelConfig:
    settings.only("quantization_config", None)
    settings.only("scale_embedding", False)
    settings.only("tie_word_embeddings", True)
    for name in ("layers", "ffn_dim", "attention_heads"):
        settings.only(f"decoder_{name}", settings.get(f"encoder_{name}"))
    return ModelConfig(
        family="encoder_decoder",
        layers=settings.get("encoder_layers"),
        hidden=settings.get("d_model"),
        heads=settings.get("encoder_attention_heads"),
        ffn=settings.get("encoder_ffn_dim"),
        seq_length=settings.get("max_position_embeddings"),
        vocab_size=settings.get("vocab_size"),
        norm_place="post",
        activation=settings.choose("activation_function", "gelu", _BART_ACTIVATIONS),
        position_offset=2,
        embedding_norm=True,
        init_std=settings.get("init_std", 0.02),
    )


def _bart_sources(config: ModelConfig) -> Iterator[Source]:
    yield Source("shared.weight", ("embedding.tokens.weight",))
    for stack, owner in (("encoder", "embedding"), ("decoder", "bridge.embedding")):
        yield Source(f"{stack}.embed_positions.weight", (f"{owner}.positions.weight",))
        leaves = {f"{stack}.layernorm_embedding": f"{owner}.norm"}
        for layer in range(config.layers):
            leaves |= _bart_block(f"{stack}.layers.{layer}", f"{stack}.{layer}", stack == "decoder")
        for theirs, ours in leaves.items():
            for kind in ("weight", "bias"):
                yield Source(f"{theirs}.{kind}", (f"{ours}.{kind}",))


def _bart_block(theirs: str, ours: str, cross: bool) -> dict[str, str]:
    """Their leaves and ours."""
    leaves = {"fc1": "ffn.up", "fc2": "ffn.down", "final_layer_norm": "ffn_norm"}
    for name, part in (("self_attn", "attention"), ("encoder_attn", "cross_attention")) if cross else (("self_attn", "attention"),):
        letters = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "output"}
        leaves |= {f"{name}.{letter}": f"{part}.{leaf}" for letter, leaf in letters.items()} | {f"{name}_layer_norm": f"{part}_norm"}
    return {f"{theirs}.{name}": f"{ours}.{leaf}" for name, leaf in leaves.items()}


ENCODER_DECODERS = {
    "T5ForConditionalGeneration": Architecture("t5", "", _t5_config, _t5_sources),
    "BartForConditionalGeneration": Architecture("bart", "model.", _bart_config, _bart_sources),
}
