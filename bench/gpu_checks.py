"""Whether the fast paths of a device say what their plain twins on the CPU say; each check is a largest difference and what it may be."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from teratron.config import Config
from teratron.data.special import SpecialTokens
from teratron.models.blockwise import Encounter, Shape, blockwise
from teratron.models.flex import flexible
from teratron.models.float8 import E4M3, E5M2, on_device, scaled_product
from teratron.models.patterns import Pattern
from teratron.models.sight import Sight
from teratron.parallel.mesh import Mesh
from teratron.train import Trainer
from teratron.train.engine import Engine
from teratron.train.trial import GeneratedSamples

STEPS = 3
SMALL: dict[str, Any] = {
    "model.layers": 2, "model.hidden": 64, "model.heads": 4, "model.seq_length": 32, "model.vocab_size": 96, "model.init_std": 0.1,
    "train.global_batch": 4, "train.micro_batch": 2, "train.deterministic": True,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model.norm": "rmsnorm", "model.activation": "swiglu", "model.position": "rope", "model.kv_heads": 2, "model.bias": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {"GPT-2": {}, "Llama": LLAMA}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
"""PyTorch's attention kernels on CUDA."""


@dataclass(frozen=True)
class Check:
    """What was compared."""

    name: str
    difference: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.difference <= self.allowed


def checks(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Check]]]:
    """All that this device can be asked; tiny: nothing is compiled, which takes minutes on a CPU."""
    cuda = device.type == "cuda"
    for family, keys in FAMILIES.items():
        for precision, allowed in (("fp64", 1e-9), ("fp32", 1e-4), ("bf16", 0.02), ("fp8", 0.05)):
            more = keys | {"train.precision": precision}
            yield from _named(f"{family}, {precision}: loss of {STEPS} steps, against float64 on the CPU", allowed, losses, more, device)
    if not tiny:
        yield from _named("train.compile, against the same without", 1e-4, compiled, device)
    for rows in (False, True):
        scaling = "rows" if rows else "tensors"
        yield from _named(f"float8 product with scales of {scaling}, against its twin", 2**-7, products, rows, device)
    for name in BACKENDS if cuda else ("flash",):
        yield from _named(f"attention by {name}, bf16, against float64", 0.05, attention, name, device)
    if cuda:
        yield from _named("attention over a window by FlexAttention, against its twin", 0.02, window, device)
    yield from _named("a run that was stopped and resumed, against one that was not", 0.0, resumed, device)


def _named(name: str, allowed: float, measure: Callable[..., float], *args: Any) -> Iterator[tuple[str, Callable[[], Check]]]:
    yield name, lambda: Check(name, measure(*args), allowed)


def losses(keys: dict[str, Any], device: torch.device) -> float:
    """The largest relative difference of losses of a few steps from those of float64 on the CPU."""
    found, exact = _learn(keys, device), _learn(keys | {"train.precision": "fp64"}, torch.device("cpu"))
    return max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))


def compiled(device: torch.device) -> float:
    found, plain = (_learn(LLAMA | {"train.compile": choice}, device) for choice in (True, False))
    return max(abs(a - b) / abs(b) for a, b in zip(found, plain, strict=True))


def _learn(keys: dict[str, Any], device: torch.device) -> list[float]:
    config = Config().override(SMALL | keys)
    engine = Engine(config, Mesh(), device)
    engine.optimizer.initialise(config.train.seed)
    samples = GeneratedSamples(config.model.seq_length, config.model.vocab_size)
    found = []
    for step in range(1, STEPS + 1):
        batch = engine.objective.prepare(samples, np.arange(4), SpecialTokens(config.model.vocab_size))
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        tally, _ = engine.step(batch, step=step, number=step, lr=1e-3)
        found.append(tally.loss())
    return found


def products(rows: bool, device: torch.device) -> float:
    """The largest difference of a float8 product from its twin, over its largest number; sizes are no multiples of anything."""
    worst = 0.0
    for a_type in (E4M3,) if rows else (E4M3, E5M2):
        a, b = (torch.randn(size, 70, device=device, dtype=torch.bfloat16) for size in (48, 50))
        exact = scaled_product(a.cpu().double(), b.cpu().double(), a_type, rows)
        worst = max(worst, _relative(on_device(a, b, a_type, rows), exact))
    return worst


def attention(name: str, device: torch.device) -> float:
    """The same for causal attention and its gradients, on a GPU with grouped heads."""
    torch.manual_seed(0)
    pairs = 2 if device.type == "cuda" else 4
    shapes = [(2, heads, 256, 64) for heads in (4, pairs, pairs)]
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes)
    with sdpa_kernel(BACKENDS[name]):
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=pairs < 4)
        slope = torch.randn_like(made)
        made.backward(slope)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=True, enable_gqa=pairs < 4)
        plain.backward(slope.cpu().double())
    compared = [(made, plain), *((mine.grad, theirs.grad) for mine, theirs in zip((q, k, v), exact, strict=True))]
    return max(_relative(mine, theirs) for mine, theirs in compared if mine is not None and theirs is not None)


def window(device: torch.device) -> float:
    q, k, v = (torch.randn(2, heads, 512, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    sight = Sight(causal=True, pattern=Pattern(128))
    plain = blockwise(q.double(), k.double(), v.double(), Encounter(sight.tiles(512, 512, 128), None, None, None, Shape(0.0)))
    return _relative(flexible(q, k, v, sight), plain)


def resumed(device: torch.device) -> float:
    """Of the losses of the last two steps, which a run makes once more from its checkpoint before them."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("to be or not to be, that is the question. " * 200)
        keys = {
            **SMALL,
            "model.vocab_size": 0,
            "data.text": str(text),
            "data.tokenizer": "bytes",
            "train.eval_every": 0,
            "log.tensorboard": False,
        }
        config, run = Config().override({**keys, "train.steps": 4, "checkpoint.every": 2}), Path(folder) / "run"
        Trainer(config, run, device=device.type, echo=False).train()
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        Trainer(config, run, device=device.type, echo=False).train()
        events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        told = [event["loss"] for event in events if event["event"] == "step"]
        return max(abs(a - b) for a, b in zip(told[2:4], told[4:], strict=True))


def _relative(found: Tensor, exact: Tensor) -> float:
    difference = (found.detach().cpu().double() - exact.detach().cpu().double()).abs().max()
    return float(difference / exact.detach().abs().max().cpu())
