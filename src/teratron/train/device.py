"""The device of a run: choice, number type, and the measured peak of its matrix products."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

from teratron.config import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """`auto` = the first CUDA device if there is one, else the CPU; raises `UserError` for a CUDA that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu, or check nvidia-smi and the PyTorch build")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


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
