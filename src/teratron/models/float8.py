"""Matrix products of operands rounded to float8 (Micikevicius et al. 2022), scaled by powers of two from what is at hand.

No history of maxima is kept, and a power of two changes no digit: but for numbers 2^14 times smaller than the largest that shares their
scale, it does not matter which others share it. Shape letters: `leaves.py`; here also M, N: rows of a product's operands, K: its sum.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import UserError
from teratron.models.leaves import Linear, accurate
from teratron.models.products import Products
from teratron.models.units import Model

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16
"""What the scaled product on CUDA wants sizes to be multiples of."""
LEAST_EXPONENT = -126
"""Of a scale, so that it is a normal float32."""


@dataclass(frozen=True)
class Float8(Products):
    """Whole operands share a scale, with gradients of outputs in e5m2; or `rows`: each row along the sum has its own, all in e4m3."""

    rows: bool

    def forward(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        y = scaled_product(x.flatten(0, -2), weight_OI, E4M3, self.rows).unflatten(0, x.shape[:-1])
        return y if bias_O is None else y + bias_O

    def of_inputs(self, slope: Tensor, weight_OI: Tensor) -> Tensor:
        return scaled_product(slope.flatten(0, -2), weight_OI.t(), self.of_slopes, self.rows).unflatten(0, slope.shape[:-1])

    def of_weight(self, slope: Tensor, x: Tensor) -> Tensor:
        return scaled_product(slope.flatten(0, -2).t(), x.flatten(0, -2).t(), self.of_slopes, self.rows)

    def add_to_weight(self, gradient_OI: Tensor, slope: Tensor, x: Tensor) -> None:
        gradient_OI.add_(self.of_weight(slope, x))

    @property
    def of_slopes(self) -> torch.dtype:
        """Type of the gradients of outputs."""
        return E4M3 if self.rows else E5M2


def scaled_product(a_MK: Tensor, b_NK: Tensor, a_type: torch.dtype, rows: bool) -> Tensor:
    """a b^T in a's numbers: a rounded to its type, b to e4m3, products summed in float32 (of float64 operands in float64)."""
    if a_MK.is_cuda and a_MK.dtype == torch.bfloat16:
        return on_device(a_MK, b_NK, a_type, rows)
    (a, a_scale), (b, b_scale) = rounded(a_MK, a_type, rows), rounded(b_NK, E4M3, rows)
    exact = accurate(a_MK.dtype)
    return ((a.to(exact) @ b.to(exact).t()) * a_scale * b_scale.t()).to(a_MK.dtype)


def rounded(x: Tensor, dtype: torch.dtype, rows: bool) -> tuple[Tensor, Tensor]:
    """x divided by its scale, in float8, and the scale: a power of two that leaves nothing out of range, [rows, 1] or of all.

    What is not finite makes its scale NaN, and so all that shares it.
    """
    exact = accurate(x.dtype)
    size = x.abs()
    largest = (size.amax(-1, keepdim=True) if rows else size.amax()).to(exact)
    exponent = torch.frexp(largest / torch.finfo(dtype).max).exponent.clamp(min=LEAST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(largest), exponent).where(largest.isfinite(), torch.nan)
    return (x.to(exact) / scale).to(dtype), scale


def on_device(a_MK: Tensor, b_NK: Tensor, a_type: torch.dtype, rows: bool) -> Tensor:
    """The same by PyTorch's scaled product; sums and columns that are not multiples of 16 are filled up with zeros."""
    count, missing = b_NK.shape[0], -a_MK.shape[1] % ALIGNED
    a, a_scale = rounded(F.pad(a_MK, (0, missing)), a_type, rows)
    b, b_scale = rounded(F.pad(b_NK, (0, missing, 0, -count % ALIGNED)), E4M3, rows)
    b_scale = b_scale.t().contiguous() if rows else b_scale
    made: Tensor = torch._scaled_mm(a.contiguous(), b.contiguous().t(), scale_a=a_scale, scale_b=b_scale, out_dtype=a_MK.dtype)
    return made[:, :count]


def use_float8(models: Sequence[Model], scaling: str, patterns: Sequence[str], device: torch.device) -> None:
    """Let the linear layers of stages of a model multiply in float8, but for those whose names match a pattern, `first` or `last`.

    Raises `UserError` on a GPU that has no such products, and for a pattern that matches no layer.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"train.precision = fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later, {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}: set --train.precision bf16"
        )
    config, family = models[0].config, type(models[0])
    blocks = {"first": "*.0.*", "last": f"*.{config.layers - 1}.*"}
    with torch.device("meta"):
        everywhere = [path for path, leaf in family(config).named_modules() if isinstance(leaf, Linear)]
    exact: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(everywhere, blocks.get(pattern, pattern))
        if not matched:
            names = ", ".join(everywhere[:3])
            raise UserError(
                f"train.fp8_except: {pattern!r} matches no linear layer: expected first, last, or a pattern of names such as {names}"
            )
        exact |= {*matched}
    for path, leaf in ((path, leaf) for model in models for path, leaf in model.named_modules()):
        if isinstance(leaf, Linear) and path not in exact:
            leaf.products = Float8(scaling == "row")
