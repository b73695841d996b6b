"""Runs megatron-core's MoELayer on CPU in float64: `python megatron_moe_worker.py FOLDER`, with megatron-core on PYTHONPATH.

FOLDER/cases.json maps a case to fields of ModelConfig, FOLDER/CASE.inputs holds our layer's parts, `x` [B, S, H] and `upstream`.
The output and the gradients of sum(output * upstream) + aux_loss * mean + z_loss * mean become FOLDER/CASE.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from teratron.config import ModelConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a page of them: no Apex, no Transformer Engine
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer

ACTIVATIONS = {"gelu": F.gelu, "swiglu": F.silu}


def main() -> None:
    folder = Path(sys.argv[1])
    patch()
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), 1, 0)
    parallel_state.initialize_model_parallel()
    for name, fields in json.loads((folder / "cases.json").read_text("utf-8")).items():
        found = run(ModelConfig(**fields), load_file(folder / f"{name}.inputs"))
        save_file({key: tensor.detach().contiguous() for key, tensor in found.items()}, folder / f"{name}.safetensors")
    dist.destroy_process_group()


def patch() -> None:
    """What keeps the layer from running on CPU and in float64 (scores are cast to float32, whatever comes), and from one result."""
    torch.cuda.current_device = lambda: "cpu"
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    moe_utils.te_general_gemm = None  # left undefined without Transformer Engine
    softmax = torch.softmax
    torch.softmax = lambda x, dim, dtype=None: softmax(x, dim)
    Tensor.float = lambda self: self
    torch.topk = first_among_equals  # its dropping by position leaves to topk which of many ones it takes


def first_among_equals(x: Tensor, k: int, dim: int, sorted: bool = True) -> tuple[Tensor, Tensor]:
    values, places = x.sort(dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


def run(config: ModelConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = build(config)
    load(config, layer, inputs)
    x = inputs["x"].transpose(0, 1).contiguous().requires_grad_()  # sequence first
    output, _ = layer(x)
    (output * inputs["upstream"].transpose(0, 1)).sum().backward()
    found = {"output": output.transpose(0, 1), "gradient.x": x.grad.transpose(0, 1)}
    return found | {f"gradient.{name}": tensor for name, tensor in by_our_names(config, layer).items()}


def build(config: ModelConfig) -> MoELayer:
    balanced = config.router_balance == "aux" and config.aux_loss
    normalised = config.normalise_gates
    settings = TransformerConfig(
        num_layers=1, hidden_size=config.hidden, ffn_hidden_size=config.ffn_width, num_attention_heads=config.heads,
        activation_func=ACTIVATIONS[config.activation], gated_linear_unit=config.gated, add_bias_linear=False,
        num_moe_experts=config.experts, moe_router_topk=config.experts_per_token, moe_ffn_hidden_size=config.expert_width,
        moe_router_score_function=config.router, moe_router_pre_softmax=config.router == "softmax" and not normalised,
        moe_router_topk_scaling_factor=None if config.gate_scale == 1 else config.gate_scale,
        moe_router_load_balancing_type="seq_aux_loss" if balanced else "none", moe_aux_loss_coeff=config.aux_loss if balanced else 0.0,
        moe_z_loss_coeff=config.z_loss or None, moe_router_enable_expert_bias=config.router_balance == "bias",
        moe_shared_expert_intermediate_size=config.shared_experts * config.expert_width or None,
        moe_expert_capacity_factor=config.capacity or None, moe_token_drop_policy="position",
        moe_token_dispatcher_type="allgather", moe_permute_fusion=False, bias_activation_fusion=False,
        params_dtype=torch.float64, use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=config.experts, moe_grouped_gemm=False)
    layer = MoELayer(settings, spec.submodules, layer_number=1).double()
    layer.set_layer_number(1)
    return layer


def matrices(config: ModelConfig, layer: MoELayer) -> dict[str, list[tuple[Any, slice]]]:
    """Where megatron-core keeps each of our parts: parameters, one an expert, and their rows."""
    every, halves = slice(None), {"gate": slice(0, config.expert_width), "up": slice(config.expert_width, None)}
    first = halves if config.gated else {"up": every}
    found = {"router.weight": [(layer.router.weight, every)]}
    for name, rows in first.items():
        found[f"experts.{name}.weight"] = [(expert.linear_fc1.weight, rows) for expert in layer.experts.local_experts]
    found["experts.down.weight"] = [(expert.linear_fc2.weight, every) for expert in layer.experts.local_experts]
    if layer.shared_experts is not None:
        width = config.shared_experts * config.expert_width
        shared = {"gate": slice(0, width), "up": slice(width, None)} if config.gated else {"up": every}
        found |= {f"shared.{name}.weight": [(layer.shared_experts.linear_fc1.weight, rows)] for name, rows in shared.items()}
        found["shared.down.weight"] = [(layer.shared_experts.linear_fc2.weight, every)]
    return found


def load(config: ModelConfig, layer: MoELayer, inputs: dict[str, Tensor]) -> None:
    for name, places in matrices(config, layer).items():
        pieces = inputs[name] if name.startswith("experts.") else inputs[name][None]
        with torch.no_grad():
            for (parameter, rows), values in zip(places, pieces, strict=True):
                parameter[rows] = values
    if "router.bias" in inputs:
        layer.router._maintain_float32_expert_bias = lambda: None
        layer.router.expert_bias = inputs["router.bias"]


def by_our_names(config: ModelConfig, layer: MoELayer) -> dict[str, Tensor]:
    found = {}
    for name, places in matrices(config, layer).items():
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad)[rows] for p, rows in places]
        found[name] = torch.stack(gradients) if name.startswith("experts.") else gradients[0]
    return found


if __name__ == "__main__":
    main()
