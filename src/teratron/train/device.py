"""The device of a run: choice, number type, and the measured peak of its matrix products."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from teratron.config import Config, UserError
from teratron.models import GPT, build_model, parameter_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def choose_device(name: str) -> torch.device:
    """`auto` = the first CUDA device if there is one, else the CPU; raises `UserError` for a CUDA that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu, or check nvidia-smi and the PyTorch build")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


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


def describe(device: torch.device) -> str:
    """The device in words, such as `cpu: AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_memory(config: Config, device: torch.device) -> None:
    """Refuse a model whose state alone exceeds the memory here: weights, gradients, masters, two moments."""
    count = parameter_count(build_model(config.model, device="meta"))
    needed = count * {"fp32": 4 * 4, "bf16": 2 + 2 + 4 * 4, "fp64": 8 * 4}[config.train.precision]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    if needed > free:
        raise UserError(
            f"{count:,} parameters in {config.train.precision} need {needed / 2**30:,.1f} GiB for weights, gradients and optimizer; "
            f"{free / 2**30:,.1f} GiB are free on {device.type}: choose a smaller model"
        )


def _available_memory() -> float:
    """Bytes that can be taken without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024


def compile_blocks(model: GPT, device: torch.device) -> None:
    """torch.compile each block; raises `UserError` on a CPU without a C++ compiler."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise UserError("train.compile on CPU needs a C++ compiler: install one (`apt-get install g++`), or drop --train.compile")
    for block in model.blocks.values():
        block.compile()


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here: the best of several, about 0.3 s in all."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + 0.25
    for attempt in range(50):
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        if attempt:  # the first one loads libraries
            best = min(best, time.perf_counter() - start)
        if attempt >= 3 and time.perf_counter() > deadline:
            break
    return 2.0 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
