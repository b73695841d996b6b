"""megatron-core's GPTModel of local layers, patched for CPU by us, in the plain loop; bf16 by autocast."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from job import Gate, Job, Shape
from torch import Tensor

from contenders.plain import alone, load, loop

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a page of them: no Apex, no Transformer Engine
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig


def train(job: Job, gate: Gate) -> None:
    alone(job)
    parallel_state.initialize_model_parallel()
    if job.device == "cpu":
        patch()
    model = build(job.shape)
    load(model, dict(state(job.shape, job.weights())))
    model.to(job.device)
    positions = torch.arange(job.shape.seq_length, device=job.device).expand(job.batch, -1)
    unseen = torch.ones(job.shape.seq_length, job.shape.seq_length, dtype=torch.bool, device=job.device).triu(1)
    loop(job, gate, model, lambda x: model(x, positions, unseen))


def patch() -> None:
    """What keeps its own layers from running without CUDA."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()


def build(shape: Shape) -> Any:
    settings = TransformerConfig(
        num_layers=shape.layers, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn, num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads, normalization="RMSNorm" if shape.llama else "LayerNorm", layernorm_epsilon=shape.norm_eps,
        activation_func=F.silu if shape.llama else F.gelu, gated_linear_unit=shape.llama, add_bias_linear=shape.bias,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, masked_softmax_fusion=False,
    )  # fmt: skip
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization=settings.normalization)
    return GPTModel(
        settings, spec, shape.vocab_size, shape.seq_length, share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope" if shape.llama else "learned_absolute", rotary_base=shape.rope_theta,
    )  # fmt: skip


def state(shape: Shape, given: dict[str, Tensor]) -> Any:
    """(its name, tensor): queries, keys and values lie group by group, gate and up one after the other."""
    top, stem, names = LLAMA if shape.llama else GPT2
    for theirs, ours in top.items():
        if ours in given:
            yield theirs, given[ours]
    for n in range(shape.layers):
        for kind in ("weight", "bias"):
            for theirs, sources in names.items():
                parts = [given[f"{stem}.{n}.{name}.{kind}"] for name in sources if f"{stem}.{n}.{name}.{kind}" in given]
                if parts:
                    yield f"decoder.layers.{n}.{theirs}.{kind}", stacked(theirs, parts, shape)


def stacked(name: str, parts: list[Tensor], shape: Shape) -> Tensor:
    if not name.endswith("linear_qkv"):
        return torch.cat(parts)
    queries, keys = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    split = torch.cat(parts).split([queries, keys, keys])
    return torch.cat([part.unflatten(0, (shape.kv_heads, -1)) for part in split], 1).flatten(0, 1)


GPT2 = (
    {
        "embedding.word_embeddings.weight": "transformer.wte.weight",
        "embedding.position_embeddings.weight": "transformer.wpe.weight",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    },
    "transformer.h",
    {
        "input_layernorm": ["ln_1"],
        "self_attention.linear_qkv": ["attn.c_attn"],
        "self_attention.linear_proj": ["attn.c_proj"],
        "pre_mlp_layernorm": ["ln_2"],
        "mlp.linear_fc1": ["mlp.c_fc"],
        "mlp.linear_fc2": ["mlp.c_proj"],
    },
)
LLAMA = (
    {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    },
    "model.layers",
    {
        "input_layernorm": ["input_layernorm"],
        "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attention.linear_proj": ["self_attn.o_proj"],
        "pre_mlp_layernorm": ["post_attention_layernorm"],
        "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.linear_fc2": ["mlp.down_proj"],
    },
)
