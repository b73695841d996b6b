"""The same weights give the same output and gradients as megatron-core's MoELayer, auxiliary and z-loss included, in float64.

What agrees: softmax scores before the choice (`normalise_gates` off) and after it (on), sigmoid scores, a bias of the choice, shared
experts, and the auxiliary loss of a sequence (megatron-core's `seq_aux_loss`: its mean over the sequences of a micro-batch is ours
over the global batch where micro-batches are equal). What does not: its capacity is that of a micro-batch, ours a sequence's, so
that case has one sequence; its sigmoid gates are always normalised.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import assert_parity
from safetensors.torch import load_file, save_file
from test_megatron import RUN_SECONDS, megatron  # noqa: F401 (a fixture)
from torch import Tensor

from teratron.config import ModelConfig
from teratron.models.moe import MoE
from teratron.models.parts import parts_of

WORKER = Path(__file__).with_name("megatron_moe_worker.py")
LENGTH, FLOOR = 10, 1e-3
PLAIN = ModelConfig(layers=1, hidden=16, heads=2, ffn=24, seq_length=LENGTH, vocab_size=10, bias=False, experts=4, aux_loss=0.0)
SWIGLU = dataclasses.replace(PLAIN, activation="swiglu", expert_ffn=8)
CASES = {
    "softmax": PLAIN,
    "normalised": dataclasses.replace(SWIGLU, normalise_gates=True, gate_scale=2.5),
    "auxiliary": dataclasses.replace(SWIGLU, aux_loss=50.0, z_loss=0.5),
    "switch": dataclasses.replace(PLAIN, experts_per_token=1, aux_loss=50.0, capacity=0.8),
    "sigmoid": dataclasses.replace(SWIGLU, router="sigmoid", normalise_gates=True, aux_loss=50.0, shared_experts=2),
    "loss-free": dataclasses.replace(SWIGLU, router="sigmoid", normalise_gates=True, router_balance="bias", experts=8, experts_per_token=3),
}


def inputs(config: ModelConfig, seed: int) -> tuple[MoE, dict[str, Tensor]]:
    """A layer of random weights, and what both sides are given."""
    layer, generator = MoE(config).double(), torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    shape = (1 if config.capacity else 3, LENGTH, config.hidden)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return layer, {"x": x, "upstream": upstream}


def parts(layer: MoE, of_gradient: bool) -> dict[str, Tensor]:
    """Each part's weight or gradient."""
    tensors = {name: parameter.grad if of_gradient else parameter.detach() for name, parameter in layer.named_parameters()}
    named = {part.name: (part, tensors[part.parameter]) for part in parts_of(layer)}
    return {name: part.of(tensor).contiguous() for name, (part, tensor) in named.items() if tensor is not None}


def ours(layer: MoE, given: dict[str, Tensor]) -> dict[str, Tensor]:
    config, x = layer.router.config, given["x"].clone().requires_grad_()
    output, routing = layer(x, None, dropless=False)
    loss = (output * given["upstream"]).sum()
    loss = loss + config.aux_loss * routing.terms.get("aux_loss", torch.zeros(())) / x.shape[0]
    loss = loss + config.z_loss * routing.terms.get("z_loss", torch.zeros(())) / (x.shape[0] * LENGTH)
    loss.backward()
    assert (routing.kept_BSC is not None and not routing.kept_BSC.all()) is (config.capacity > 0), "capacity must bind where it is set"
    found = {"output": output.detach(), "gradient.x": x.grad}
    return found | {f"gradient.{name}": gradient for name, gradient in parts(layer, True).items()}


def theirs(folder: Path, package: Path) -> None:
    """Run every case; the results come as files in `folder`."""
    (folder / "cases.json").write_text(json.dumps({name: dataclasses.asdict(config) for name, config in CASES.items()}), "utf-8")
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(folder)]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def test_output_and_gradients_equal_megatron_core(megatron: Path, tmp_path: Path) -> None:  # noqa: F811
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for seed, (name, config) in enumerate(CASES.items()):
        layer, given = inputs(config, seed)
        save_file(parts(layer, False) | given, tmp_path / f"{name}.inputs")
        tensors = ours(layer, given)
        tiny = [key for key, tensor in tensors.items() if tensor.abs().max() < FLOOR]
        assert not tiny, f"{name}: too small to be compared: {tiny}"
        found |= {f"{name}: {key}": tensor for key, tensor in tensors.items()}
    theirs(tmp_path, megatron)
    for name in CASES:
        expected |= {f"{name}: {key}": tensor for key, tensor in load_file(tmp_path / f"{name}.safetensors").items()}
    assert_parity(found, expected, tol=1e-9, lr=FLOOR, steps=1)


@pytest.mark.parametrize("name", ["auxiliary", "sigmoid"])
def test_the_compared_gradients_hold_the_auxiliary_loss(name: str) -> None:
    """Or the comparison could agree without it."""
    slopes = []
    for config in (CASES[name], dataclasses.replace(CASES[name], aux_loss=0.0, z_loss=0.0)):
        layer, given = inputs(config, 1)
        slopes.append(ours(layer, given)["gradient.router.weight"])
    assert (slopes[0] - slopes[1]).abs().max() > 0.05 * slopes[1].abs().max()
