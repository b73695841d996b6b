"""How fast training steps, products and attention are on a device: one table's rows, each of which may run out of memory alone."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import BACKENDS
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from teratron.config import Config
from teratron.models import build_model, flops_per_token
from teratron.models.float8 import E4M3, rounded
from teratron.plan.dryrun import dry_run
from teratron.train.device import synchronize
from teratron.train.engine import Engine
from teratron.train.trial import Trial, best_seconds

LLAMA: dict[str, Any] = {
    "model.norm": "rmsnorm", "model.activation": "swiglu", "model.position": "rope", "model.bias": False, "model.tie_embeddings": False,
}  # fmt: skip
ONE: dict[str, Any] = {
    "model.layers": 18, "model.hidden": 2048, "model.heads": 16, "model.ffn": 5632, "model.seq_length": 4096, "model.vocab_size": 32768,
}  # fmt: skip
EIGHT: dict[str, Any] = {**ONE, "model.layers": 32, "model.hidden": 4096, "model.heads": 32, "model.kv_heads": 8, "model.ffn": 14336}
TINY: dict[str, Any] = {
    "model.layers": 2, "model.hidden": 64, "model.heads": 4, "model.ffn": 96, "model.seq_length": 64, "model.vocab_size": 256,
}  # fmt: skip
SPARE = 0.9
"""Share of a device's free memory that the dry run's peak may take: allocators lose some."""


@dataclass(frozen=True)
class Time:
    """A row of the table."""

    name: str
    flops: float
    """Floating-point operations a second."""
    tokens_per_second: float = 0.0
    memory: float = 0.0
    """Bytes at the peak."""
    kinds: dict[str, float] | None = None
    """Milliseconds of a traced step by kind of work."""


Rows = Iterator[tuple[str, Callable[[], Time]]]


def times(device: torch.device, tiny: bool, steps: int) -> Rows:
    """All rows, each to be measured when it is called; tiny: nothing is compiled."""
    yield from kernels(device, 256 if tiny else 8192, 64 if tiny else 4096)
    one = LLAMA | (TINY if tiny else ONE)
    for precision in ("bf16", "fp8"):
        for micro in (1,) if tiny else (2, 4, 8):
            yield step_row("1B", one | batches(micro, 2) | {"train.precision": precision}, device, steps)
        yield step_row(
            "1B compiled", one | batches(1 if tiny else 4, 2) | {"train.precision": precision, "train.compile": not tiny}, device, steps
        )
    rows = {"train.precision": "fp8", "train.fp8_scaling": "row", "train.compile": not tiny}
    yield step_row("1B compiled, scales of rows", one | batches(1 if tiny else 4, 2) | rows, device, steps)
    for backend in BACKENDS if device.type == "cuda" else ("flash",):
        more = {"train.precision": "bf16", "train.compile": not tiny}
        yield step_row(f"1B compiled, attention by {backend}", one | batches(1 if tiny else 4, 2) | more, device, steps, backend)
    if importlib.util.find_spec("transformers") is not None:
        for micro in (1,) if tiny else (2, 4):
            config = Config().override(one | batches(micro, 2))
            yield f"1B by transformers, bf16, {micro} x 2", partial(transformers_time, config, device, steps)
    for precision in ("bf16", "fp8"):
        keys = LLAMA | (TINY if tiny else EIGHT) | batches(1, 2) | {"train.precision": precision}
        yield f"8B layers, {precision}", partial(fitting_time, keys | {"train.compile": not tiny}, device, steps)


def batches(micro: int, count: int) -> dict[str, Any]:
    """count: micro-batches of a step."""
    return {"train.micro_batch": micro, "train.global_batch": micro * count}


def step_row(name: str, keys: dict[str, Any], device: torch.device, steps: int, backend: str = "") -> tuple[str, Callable[[], Time]]:
    """backend: of attention; "" = as PyTorch chooses."""
    full = f"{name}, {keys['train.precision']}, {keys['train.micro_batch']} x {keys['train.global_batch'] // keys['train.micro_batch']}"
    return full, partial(step_time, full, keys, device, steps, backend)


def step_time(name: str, keys: dict[str, Any], device: torch.device, steps: int, backend: str = "") -> Time:
    """Whole steps of this project, and where their time goes."""
    fresh(device)
    chosen: AbstractContextManager[Any] = sdpa_kernel(BACKENDS[backend]) if backend else nullcontext()
    with chosen:
        trial = Trial(Config().override(keys), device.type)
        speed = trial.speed(steps)
        (kinds,) = trial.breakdown(1, None)
    return Time(name, speed.mfu * speed.peak_flops, speed.tokens_per_second, speed.memory, kinds)


def fitting_time(keys: dict[str, Any], device: torch.device, steps: int) -> Time:
    """As many layers as the dry run says that fit."""
    fresh(device)
    keys = keys | {"model.layers": fitting_layers(keys, free_bytes(device))}
    return step_time(f"8B, {keys['model.layers']} layers, {keys['train.precision']}", keys, device, steps)


def fitting_layers(keys: dict[str, Any], free: float) -> int:
    """Layers, up to those of the keys, whose step takes no more bytes than are free."""
    plain = Config().override(keys | {"train.compile": False})
    one, two = (dry_run(plain.override({"model.layers": layers}), 1, 0, Engine).total for layers in (1, 2))
    return max(1, min(keys["model.layers"], 1 + int((SPARE * free - one) // (two - one))))


def free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2.0**30


def fresh(device: torch.device) -> None:
    """Forget what the row before has left."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def kernels(device: torch.device, size: int, length: int) -> Rows:
    """Large products in bfloat16 and float8, and causal attention forwards and backwards by each kernel."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield "product, bf16", lambda: Time("product, bf16", 2 * size**3 / best_seconds(lambda: drop(a @ b), device))
    for rows in (False, True):
        name = f"product, fp8, scales of {'rows' if rows else 'tensors'}"
        yield name, partial(float8_time, name, a, b, rows)
    for backend in BACKENDS if device.type == "cuda" else ("flash",):
        yield f"attention, {backend}", partial(attention_time, f"attention by {backend}, forwards and backwards", backend, length, device)


def float8_time(name: str, a: Tensor, b: Tensor, rows: bool) -> Time:
    """The product alone, of operands that are rounded already."""
    (a8, a_scale), (b8, b_scale) = rounded(a, E4M3, rows), rounded(b, E4M3, rows)
    b_scale = b_scale.t().contiguous() if rows else b_scale
    seconds = best_seconds(lambda: drop(torch._scaled_mm(a8, b8.t(), a_scale, b_scale, out_dtype=torch.bfloat16)), a.device)
    return Time(name, 2 * len(a) ** 3 / seconds)


def attention_time(name: str, backend: str, length: int, device: torch.device) -> Time:
    heads, features, batch = 16, 128, 2
    q, k, v = (torch.randn(batch, heads, length, features, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))

    def both() -> None:
        with sdpa_kernel(BACKENDS[backend]):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    products = 2 + 4  # as models are counted: what the backward pass makes again is not
    return Time(name, products * batch * heads * length**2 * features / best_seconds(both, device))


def drop(made: Tensor) -> None:
    """A result that nobody wants."""


def transformers_time(config: Config, device: torch.device, steps: int) -> Time:
    """The same shape by `LlamaForCausalLM` under autocast, with fused AdamW, clipping and torch.compile."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fresh(device)
    model, train = config.model, config.train
    shape: Any = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=model.vocab_size, hidden_size=model.hidden, intermediate_size=model.ffn, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, max_position_embeddings=model.seq_length, attn_implementation="sdpa",
    )  # fmt: skip
    peer: Any = LlamaForCausalLM(shape)
    peer.to(device)
    run = torch.compile(peer) if device.type == "cuda" else peer
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True)
    rows = torch.randint(model.vocab_size, (train.micro_batch, model.seq_length), device=device)
    count = train.global_batch // train.micro_batch

    def step() -> None:
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16):
                loss = run(input_ids=rows, labels=rows).loss / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    synchronize(device)
    seconds = best_seconds(step, device, steps)
    tokens = train.global_batch * model.seq_length
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Time(f"1B by transformers, {train.micro_batch} x {count}", tokens * needed(config) / seconds, tokens / seconds, peak)


def needed(config: Config) -> float:
    """Floating-point operations of a token."""
    return flops_per_token(build_model(config.model, device="meta"), config.model.seq_length)
