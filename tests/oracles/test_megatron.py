"""The same weights give the same logits, loss and gradients as megatron-core's GPTModel, tensor-parallel 1 and 2, in float64.

So does our pipeline of two ranks, whose loss and gradient norm are compared with megatron-core's whole model; its own
pipeline was not tried.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from parity import assert_parity
from safetensors.torch import load_file, save_file
from torch import Tensor

from teratron.config import Config, ModelConfig
from teratron.models import GPT, build_model, initialise, parts_of
from teratron.objectives import Batch, NextToken, total_loss

MEGATRON = "megatron-core==0.16.1"
WORKER, PIPELINE = (Path(__file__).with_name(f"{name}_worker.py") for name in ("megatron", "pipeline"))
INSTALL_SECONDS, RUN_SECONDS = 120, 120
LENGTH, VOCAB = 12, 50
GPT2 = ModelConfig(layers=2, hidden=16, heads=4, seq_length=LENGTH, vocab_size=VOCAB, vocab_multiple=16, init_std=0.3)
LLAMA = dataclasses.replace(
    GPT2, kv_heads=2, ffn=40, norm="rmsnorm", activation="swiglu", position="rope", tie_embeddings=False, bias=False, rope_theta=5e5
)
STYLES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "normed-wide-heads": dataclasses.replace(LLAMA, qk_norm=True, head_dim=6, tie_embeddings=True, activation="geglu"),
}
SCHEDULES = {"gpt2": "1f1b", "llama": "zb-h1", "normed-wide-heads": "gpipe"}
LAYOUTS = {"tensor-1": (1, False), "tensor-2": (2, False), "tensor-2-sequence": (2, True)}
FLOOR = 1e-3
"""Gradients are compared relative to their largest element, but never to less than this."""


@pytest.fixture(scope="module")
def megatron() -> Path:
    """A folder that holds megatron-core alone, without its dependencies: the project's torch serves it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teratron-tests"
    folder, reason = cache / MEGATRON.replace("==", "-"), ""
    if not folder.is_dir():
        try:
            install(folder)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            reason = str(error)
    if not folder.is_dir():  # another process may have been faster
        pytest.skip(f"{MEGATRON}, the oracle, cannot be installed: {reason}")
    return folder


def install(folder: Path) -> None:
    """Install into `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{fresh}/package", MEGATRON]
        result = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr.strip()[-300:])
        Path(fresh, "package").rename(folder)


def made(config: ModelConfig) -> GPT:
    """A model whose biases and norms are random too."""
    model = build_model(config, dtype=torch.float64)
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def batch() -> Batch:
    """Tokens and targets with uneven weights, some of them 0."""
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(VOCAB, (2, 3, LENGTH), generator=generator).unbind()
    weights = torch.randint(4, tokens.shape, generator=generator).double() / 2
    return {"tokens": tokens, "targets": targets, "weights": weights, "positions": torch.arange(LENGTH).expand(tokens.shape).contiguous()}


def by_part(model: GPT, of_gradient: bool) -> dict[str, Tensor]:
    """Each part's weight or gradient."""
    tensors = {name: parameter.grad if of_gradient else parameter.detach() for name, parameter in model.named_parameters()}
    return {part.name: part.of(tensors[part.parameter]).contiguous() for part in parts_of(model)}


def ours(model: GPT) -> dict[str, Tensor]:
    """Logits, loss and gradients of the single process."""
    objective, given = NextToken(Config()), batch()
    state = model(objective.inputs(given))
    assert model.head is not None
    loss = total_loss(objective.terms(model, state, given), objective.counts(given))
    loss.backward()
    found = {"logits": model.head.output(state["hidden"]).detach(), "loss": loss.detach()}
    return found | {f"gradient.{name}": gradient for name, gradient in by_part(model, True).items()}


def theirs(models: dict[str, GPT], megatron: Path, folder: Path) -> None:
    """Run every style in every layout; the results come as files in `folder`."""
    cases = {}
    for style, model in models.items():
        save_file(by_part(model, False) | {f"batch.{name}": tensor for name, tensor in batch().items()}, folder / f"{style}.inputs")
        for layout, (tensor, sequence) in LAYOUTS.items():
            fields = dataclasses.asdict(model.config)
            cases[f"{style}-{layout}"] = {"model": fields, "inputs": f"{style}.inputs", "tensor": tensor, "sequence": sequence}
    (folder / "cases.json").write_text(json.dumps(cases), "utf-8")
    run_worker(WORKER, folder, megatron)


def run_worker(script: Path, folder: Path, megatron: Path, seconds: int = RUN_SECONDS) -> None:
    # It compiles functions when imported, unless told not to; and it must see no GPU, because its collectives run on CPU.
    path = os.pathsep.join(filter(None, [str(megatron), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder)]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=seconds, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def pipelined(models: dict[str, GPT], megatron: Path, folder: Path) -> None:
    """Our own two ranks on the same inputs."""
    cases = {
        f"{style}-pipeline": {"model": dataclasses.asdict(model.config), "inputs": f"{style}.inputs", "schedule": SCHEDULES[style]}
        for style, model in models.items()
    }
    (folder / "pipelines.json").write_text(json.dumps(cases), "utf-8")
    run_worker(PIPELINE, folder, megatron)


def test_logits_loss_and_gradients_equal_megatron_core(megatron: Path, tmp_path: Path) -> None:
    models = {style: made(config) for style, config in STYLES.items()}
    theirs(models, megatron, tmp_path)
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for style, model in models.items():
        tensors = ours(model)
        # Without rotation a key's bias moves all scores of a query alike: its exact gradient is 0.
        tiny = [name for name, tensor in tensors.items() if tensor.abs().max() < FLOOR and not name.endswith(".k.bias")]
        assert not tiny, f"{style}: too small to be compared: {tiny}"
        for layout in LAYOUTS:
            case = f"{style}-{layout}"
            found |= {f"{case}: {name}": tensor for name, tensor in tensors.items()}
            expected |= {f"{case}: {name}": tensor for name, tensor in load_file(tmp_path / f"{case}.safetensors").items()}
    assert_parity(found, expected, tol=1e-9, lr=FLOOR, steps=1)
    pipelined(models, megatron, tmp_path)
    for style in models:
        piped, whole = (load_file(tmp_path / f"{style}-{case}.safetensors") for case in ("pipeline", "tensor-1"))
        norm = torch.stack([gradient.norm() for name, gradient in whole.items() if name.startswith("gradient.")]).norm()
        assert_parity(piped, {"loss": whole["loss"], "norm": norm}, tol=1e-9, lr=0.0, steps=1)
