"""The device of a run: choice, number type, and the measured peak of its matrix products."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from teratron.config import Config, UserError
from teratron.models import Model
from teratron.models.blocks import Block
from teratron.models.products import emulated
from teratron.optim import OPTIMIZERS
from teratron.optim.groups import treatment_of
from teratron.parallel.device import DTYPES, has_compiler
from teratron.parallel.mesh import Mesh
from teratron.parallel.stages import cut_stages
from teratron.parallel.worker import this_worker
from teratron.train.float32 import by_onednn


def set_deterministic(wanted: bool) -> None:
    """Only deterministic kernels from here on, or any."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of giving it back to the kernel.

    By default every large buffer of a step is returned and page-faulted in again by the next one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc only
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """The device in words, such as `cpu: AMD EPYC, 2 threads`, and which products it chose for the run's type."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    chosen = ", which multiplies them as float32" if emulated(torch.empty(0, dtype=dtype)) else ""
    chosen += ", float32 products by oneDNN" if by_onednn() else ""
    return f"cpu: {_processor()}, {torch.get_num_threads()} threads{chosen}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_memory(config: Config, mesh: Mesh, device: torch.device) -> None:
    """Refuse a model whose state alone exceeds the memory here: this rank's weights, gradients, masters and moments."""
    owners, counts = mesh.group("shard", "context").size, Counter[bool]()
    for part in cut_stages(config.model, mesh, config.parallel).parts():
        counts[treatment_of(part, config.optim, config.model).frozen] += math.prod(part.size)
    count, needed = counts.total(), counts[False] * state_bytes(config, owners) + counts[True] * weight_bytes(config, owners)
    beside = counts[False] * optimizer_bytes(config, owners)
    if config.parallel.offload == "cpu" and beside > free_memory():
        raise UserError(
            f"parallel.offload = cpu needs {beside / 2**30:,.1f} GiB of host memory on each process, {free_memory() / 2**30:,.1f} GiB are "
            "free: choose --parallel.offload disk, or share the state with parallel.shard over more processes"
        )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if needed > free:
        raise UserError(
            f"{count:,} parameters in {config.train.precision} need {needed / 2**30:,.1f} GiB on each process for weights, gradients and "
            f"optimizer; {free / 2**30:,.1f} GiB are free on {device.type}: choose a smaller model, keep the optimizer's "
            "state elsewhere with parallel.offload, or cut it with parallel.tensor or parallel.shard over more processes"
        )


def state_bytes(config: Config, owners: int) -> float:
    """Bytes of state a parameter on the device of each of `owners` ranks that share what `parallel.shard` says."""
    weight = DTYPES[config.train.precision].itemsize
    exact = max(weight, 4)
    gradients = (exact + weight * (weight < exact)) / 1 if config.parallel.shard in ("none", "optimizer") else exact / owners
    optimizer = optimizer_bytes(config, owners) if config.parallel.offload == "none" else 0
    return optimizer + gradients + weight_bytes(config, owners)


def optimizer_bytes(config: Config, owners: int) -> float:
    """Bytes of masters and moments a parameter on each of `owners` ranks, wherever `parallel.offload` keeps them."""
    weight = DTYPES[config.train.precision].itemsize
    exact = max(weight, 4)
    half = weight < exact
    optimizer_class = OPTIMIZERS[config.optim.name]
    masters = exact if config.optim.masters == "fp32" and (half or optimizer_class.keeps_masters) else 0
    moments = len(optimizer_class.states) * (2 if config.optim.moments == "bf16" else exact)
    return (moments + masters) / (1 if config.parallel.shard == "none" else owners)


def weight_bytes(config: Config, owners: int) -> float:
    """Bytes of a parameter's weight alone, all there is of one that is frozen."""
    return DTYPES[config.train.precision].itemsize / (owners if config.parallel.shard == "parameters" else 1)


def free_memory() -> float:
    """Bytes of host memory that this process may take without swapping, its share of what is free; infinite where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    worker = this_worker()
    neighbours = worker.local_world if worker is not None else 1
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024 / neighbours


def compile_blocks(model: Model, device: torch.device) -> None:
    """torch.compile each block; raises `UserError` on a CPU without a C++ compiler."""
    if not has_compiler(device):
        raise UserError("train.compile on CPU needs a C++ compiler: install one (`apt-get install g++`), or drop --train.compile")
    for block in model.units():
        if isinstance(block, Block):
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]  # the hooks around it stay eager


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here: the best of several, about 0.3 s in all.

    Types that are widened have the peak of float32.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a, b = (x.float() if emulated(x) else x for x in (a, b))
    best, deadline = float("inf"), time.perf_counter() + 0.25
    for attempt in range(50):
        start = time.perf_counter()
        (F.linear if attempt % 2 else torch.mm)(a, b)  # on CPU either may be the slower one, in float16 by far
        synchronize(device)
        if attempt:  # the first one loads libraries
            best = min(best, time.perf_counter() - start)
        if attempt >= 3 and time.perf_counter() > deadline:
            break
    return 2.0 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
