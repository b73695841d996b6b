"""What the contenders train: the shapes, the random tokens, and the initial weights that all of them start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from job import CHECKS, Shape
from safetensors.torch import save_file
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
    shape: Shape
    batch: int
    """Sequences of one step, which is one micro-batch."""
    steps: int
    """Timed steps of a round by default: one to a few seconds on two CPU cores."""

    @property
    def model(self) -> ModelConfig:
        """The shape as this project's config."""
        return model_of(self.shape)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.shape.seq_length


def _gpt2(layers: int, hidden: int, heads: int, length: int, vocab: int, bias: bool = True) -> Shape:
    return Shape(False, layers, hidden, heads, heads, 4 * hidden, length, vocab, bias, True, 1e-5, 0.0)


_LLAMA = Shape(True, 12, 768, 12, 4, 2048, 1024, 32768, False, False, 1e-5, 1e4)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("A", "GPT-2 style, vocabulary 50,304", _gpt2(6, 384, 6, 256, 50304), batch=8, steps=2),
        Workload("B", "GPT-2 style, vocabulary 256", _gpt2(6, 384, 6, 256, 256), batch=12, steps=2),
        Workload("C", "Llama style, grouped-query attention", _LLAMA, batch=1, steps=1),
        Workload("char", "nanoGPT's Shakespeare settings for CPU", _gpt2(4, 128, 4, 64, 65, bias=False), batch=12, steps=100),
    )
}


def model_of(shape: Shape) -> ModelConfig:
    """The shape as this project's config."""
    sizes = {name: getattr(shape, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "seq_length", "vocab_size", "bias")}
    common = ModelConfig(**sizes, tie_embeddings=shape.tied, norm_eps=shape.norm_eps)
    return replace(common, norm="rmsnorm", activation="swiglu", position="rope", rope_theta=shape.rope_theta) if shape.llama else common


def write_inputs(folder: Path, workload: Workload, parts: Mapping[str, Tensor]) -> None:
    """What every contender finds in the folder of its `Job`: a million random tokens, the batches of the checks, the weights `parts`."""
    vocab = workload.shape.vocab_size
    tokens = np.random.default_rng(SEED).integers(vocab, size=2**20)
    np.save(folder / "tokens.npy", tokens.astype(smallest_dtype(vocab)))
    with IndexedWriter(folder / "tokens", smallest_dtype(vocab)) as writer:
        writer.add_document(tokens)
    np.save(folder / "checks.npy", np.stack([random_rows(workload, seed) for seed in range(CHECKS)]))
    torch.save(peer_state(workload.shape, parts), folder / "weights.pt")
    save_file(dict(parts), folder / "parts.safetensors")


def random_rows(workload: Workload, seed: int) -> np.ndarray:
    """One batch of uniformly random token ids, int64 [B, S + 1]."""
    shape = (workload.batch, workload.shape.seq_length + 1)
    return np.random.default_rng(seed).integers(workload.shape.vocab_size, size=shape)


def initial_parts(config: ModelConfig, seed: int = SEED) -> dict[str, Tensor]:
    """The weights that every contender starts from, by the part names of this project, float32."""
    model = build_model(config)
    initialise(model, seed)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {part.name: part.of(parameters[part.parameter]) for part in parts_of(model)}


def peer_state(shape: Shape, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by the names of `LlamaForCausalLM` or `GPT2LMHeadModel`, each matrix [out, in]; tied ones appear once."""
    names = _llama_names(shape) if shape.llama else _gpt2_names(shape)
    return {theirs: torch.cat([parts[name] for name in ours]) for theirs, ours in names if all(name in parts for name in ours)}


def _gpt2_names(shape: Shape) -> Iterator[tuple[str, list[str]]]:
    """(their name, the parts that it stacks along the outputs); a bias that the shape leaves out is named all the same."""
    yield "transformer.wte.weight", ["embedding.tokens.weight"]
    yield "transformer.wpe.weight", ["embedding.positions.weight"]
    for layer in range(shape.layers):
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


def _llama_names(shape: Shape) -> Iterator[tuple[str, list[str]]]:
    yield "model.embed_tokens.weight", ["embedding.tokens.weight"]
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"}
    for layer in range(shape.layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        yield f"{theirs}.input_layernorm.weight", [f"{ours}.attention_norm.weight"]
        yield f"{theirs}.post_attention_layernorm.weight", [f"{ours}.ffn_norm.weight"]
        for name, part in attention.items():
            yield f"{theirs}.self_attn.{name}.weight", [f"{ours}.attention.{part}.weight"]
        for part in ("gate", "up", "down"):
            yield f"{theirs}.mlp.{part}_proj.weight", [f"{ours}.ffn.{part}.weight"]
    yield "model.norm.weight", ["head.norm.weight"]
    yield "lm_head.weight", ["head.output.weight"]
