"""What the contenders train: the shapes, the random tokens, and the initial weights that all of them start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from teratron.config import ModelConfig, OptimConfig
from teratron.data.indexed import IndexedWriter, smallest_dtype
from teratron.models import build_model, initialise, parts_of

SEED = 1234
OPTIM = OptimConfig(lr=1e-4, schedule="constant", weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip=1.0)
"""Every contender's optimizer."""


@dataclass(frozen=True)
class Workload:
    """One shape of model and batch."""

    name: str
    about: str
    model: ModelConfig
    batch: int
    """Sequences of one step, which is one micro-batch."""
    steps: int
    """Timed steps of a round by default: one to a few seconds on two CPU cores."""

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.model.seq_length


_GPT2 = ModelConfig(layers=6, hidden=384, heads=6, seq_length=256, vocab_size=50304)
_BYTES = ModelConfig(layers=6, hidden=384, heads=6, seq_length=256, vocab_size=256)
_LLAMA = ModelConfig(
    layers=12, hidden=768, heads=12, kv_heads=4, ffn=2048, seq_length=1024, vocab_size=32768,
    norm="rmsnorm", activation="swiglu", position="rope", tie_embeddings=False, bias=False,
)  # fmt: skip
_CHAR = ModelConfig(layers=4, hidden=128, heads=4, seq_length=64, vocab_size=65, bias=False)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("A", "GPT-2 style, vocabulary 50,304", _GPT2, batch=8, steps=2),
        Workload("B", "GPT-2 style, vocabulary 256", _BYTES, batch=12, steps=2),
        Workload("C", "Llama style, grouped-query attention", _LLAMA, batch=1, steps=1),
        Workload("char", "nanoGPT's Shakespeare settings for CPU", _CHAR, batch=12, steps=100),
    )
}


def is_llama(config: ModelConfig) -> bool:
    """Whether a model is written as `LlamaForCausalLM`; the others are written as GPT-2."""
    return config.position == "rope"


def random_rows(workload: Workload, seed: int) -> np.ndarray:
    """One batch of uniformly random token ids, int64 [B, S + 1]."""
    shape = (workload.batch, workload.model.seq_length + 1)
    return np.random.default_rng(seed).integers(workload.model.vocab_size, size=shape)


def write_tokens(prefix: Path, workload: Workload, seed: int = SEED) -> None:
    """A data set PREFIX.bin, PREFIX.idx of about a million random tokens, long enough for some hundred batches of any shape."""
    vocab = workload.model.vocab_size
    with IndexedWriter(prefix, smallest_dtype(vocab)) as writer:
        writer.add_document(np.random.default_rng(seed).integers(vocab, size=2**20))


def initial_parts(config: ModelConfig, seed: int = SEED) -> dict[str, Tensor]:
    """The weights that every contender starts from, by the part names of this project, float32."""
    model = build_model(config)
    initialise(model, seed)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {part.name: part.of(parameters[part.parameter]) for part in parts_of(model)}


def peer_state(config: ModelConfig, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by the names of `LlamaForCausalLM` or `GPT2LMHeadModel`, each matrix [out, in]; tied ones appear once."""
    names = _llama_names(config) if is_llama(config) else _gpt2_names(config)
    return {theirs: torch.cat([parts[name] for name in ours]) for theirs, ours in names if all(name in parts for name in ours)}


def _gpt2_names(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """(their name, the parts that it stacks along the outputs); a bias that the config leaves out is named all the same."""
    yield "transformer.wte.weight", ["embedding.tokens.weight"]
    yield "transformer.wpe.weight", ["embedding.positions.weight"]
    for layer in range(config.layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            yield f"{theirs}.ln_1.{kind}", [f"{ours}.attention_norm.{kind}"]
            yield f"{theirs}.attn.c_attn.{kind}", [f"{ours}.attention.{part}.{kind}" for part in "qkv"]
            yield f"{theirs}.attn.c_proj.{kind}", [f"{ours}.attention.output.{kind}"]
            yield f"{theirs}.ln_2.{kind}", [f"{ours}.ffn_norm.{kind}"]
            yield f"{theirs}.mlp.c_fc.{kind}", [f"{ours}.ffn.up.{kind}"]
            yield f"{theirs}.mlp.c_proj.{kind}", [f"{ours}.ffn.down.{kind}"]
    for kind in ("weight", "bias"):
        yield f"transformer.ln_f.{kind}", [f"head.norm.{kind}"]
    yield "lm_head.weight", ["head.output.weight"]


def _llama_names(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    yield "model.embed_tokens.weight", ["embedding.tokens.weight"]
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"}
    for layer in range(config.layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        yield f"{theirs}.input_layernorm.weight", [f"{ours}.attention_norm.weight"]
        yield f"{theirs}.post_attention_layernorm.weight", [f"{ours}.ffn_norm.weight"]
        for name, part in attention.items():
            yield f"{theirs}.self_attn.{name}.weight", [f"{ours}.attention.{part}.weight"]
        for part in ("gate", "up", "down"):
            yield f"{theirs}.mlp.{part}_proj.weight", [f"{ours}.ffn.{part}.weight"]
    yield "model.norm.weight", ["head.norm.weight"]
    yield "lm_head.weight", ["head.output.weight"]
