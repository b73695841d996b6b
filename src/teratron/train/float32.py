"""oneDNN's float32 products in place of MKL's, on CPUs for which MKL has only AVX2 kernels though they have AVX-512: those of AMD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

TOLERANCE = 1e-5
"""Largest error of a float32 product of 256 terms, over its largest element; bfloat16 products are off by 1e-3."""


def choose_float32_products() -> None:
    """Take oneDNN's where they are faster, unless they round.

    PyTorch takes them when it is allowed to round operands to bfloat16, which oneDNN does only with matrix instructions (AMX): whether it
    does is tested. Whether they are faster is a fact of the CPU and not measured, so that runs repeat bit for bit.
    """
    setting = _setting()
    before = setting.fp32_precision
    if not amd_with_avx512() or not torch.backends.mkldnn.is_available():
        return
    setting.fp32_precision = "bf16"
    if not float32_is_kept():
        setting.fp32_precision = before


def by_onednn() -> bool:
    """Whether they were taken."""
    return bool(_setting().fp32_precision == "bf16")


def _setting() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # the module puts an object in its own place


def amd_with_avx512() -> bool:
    """Whether PyTorch uses AVX-512 on an AMD CPU here."""
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return vendor and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def float32_is_kept() -> bool:
    """Whether products of float32 matrices have the precision of float32."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=draw) for _ in range(2))
    exact = a.double() @ b.double().t()
    return all(bool((made.double() - exact).abs().max() < TOLERANCE * exact.abs().max()) for made in (F.linear(a, b), a @ b.t()))
