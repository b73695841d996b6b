"""litgpt's GPT, its loop on Lightning Fabric. Its GPT-2 has no learned positions or tied embeddings: the shape alone is equal."""

from __future__ import annotations

from typing import Any

import litgpt
import torch
from job import Gate, Job, Shape
from lightning import Fabric
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from contenders.plain import adamw, count, load


def train(job: Job, gate: Gate) -> None:
    fabric = Fabric(accelerator=job.device, devices=1, precision="bf16-mixed" if job.precision == "bf16" else "32-true")
    plain = build(job.shape)
    if job.shape.llama:
        load(plain, state(job.shape, job.weights()))
    model = fabric.setup(plain)
    optimizer = fabric.setup_optimizers(adamw(job, plain))
    gate.ready(count(plain))
    for x, y in job.batches():
        loss = chunked_cross_entropy(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=job.clip)
        optimizer.step()
        optimizer.zero_grad()
        gate.passed(loss.detach())


def build(shape: Shape) -> litgpt.GPT:
    common: dict[str, Any] = {
        "block_size": shape.seq_length, "n_layer": shape.layers, "n_embd": shape.hidden, "n_head": shape.heads,
        "n_query_groups": shape.kv_heads, "padded_vocab_size": shape.vocab_size, "vocab_size": shape.vocab_size, "bias": shape.bias,
        "intermediate_size": shape.ffn, "norm_eps": shape.norm_eps, "parallel_residual": False,
    }  # fmt: skip
    if shape.llama:
        common |= {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0, "rope_base": int(shape.rope_theta)}
    else:
        common |= {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "rotary_percentage": 0.0}
    torch.manual_seed(1234)
    model = litgpt.GPT(litgpt.Config(**common))
    model.apply(model._init_weights)
    return model


def state(shape: Shape, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's weights by litgpt's names: queries, keys and values one after the other."""
    found = {
        "transformer.wte.weight": given["model.embed_tokens.weight"],
        "transformer.ln_f.weight": given["model.norm.weight"],
        "lm_head.weight": given["lm_head.weight"],
    }
    for n in range(shape.layers):
        layer = {name.removeprefix(f"model.layers.{n}."): value for name, value in given.items() if name.startswith(f"model.layers.{n}.")}
        qkv = torch.cat([layer[f"self_attn.{x}_proj.weight"] for x in "qkv"])
        names = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj"}
        names |= {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
        found |= {f"transformer.h.{n}.{theirs}.weight": layer[f"{ours}.weight"] for theirs, ours in names.items()}
        found[f"transformer.h.{n}.attn.qkv.weight"] = qkv
    return found
