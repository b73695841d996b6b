"""The matrix products of linear layers and of their gradients: all go through here, where numbers may be rounded and gradients wait.

Half types on a CPU without instructions for them are widened: PyTorch would compute their products 10 to 100 times slower than float32's.
Shape letters: `leaves.py`; here also I: inputs, O: outputs, M, N: rows and columns of a product, K: its sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CONVERTED = 2**20
"""Weights of a half type that are widened at once: few enough to stay in the cache until they are used."""
FEW_ROWS = 2
"""So many rows of bfloat16 are multiplied without widening: the weights' way from memory is what takes the time."""


class Products:
    """In the operands' own numbers, or in float32 and rounded once where those would be emulated."""

    def forward(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x [..., I] W^T + b."""
        return widened_linear(x, weight_OI, bias_O) if emulated(x) else F.linear(x, weight_OI, bias_O)

    def of_inputs(self, slope: Tensor, weight_OI: Tensor) -> Tensor:
        """The gradient of x, from that of the outputs [..., O]."""
        return matmul(slope, weight_OI)

    def of_weight(self, slope: Tensor, x: Tensor) -> Tensor:
        """The weight's gradient [O, I]."""
        return matmul(slope.flatten(0, -2).t(), x.flatten(0, -2))

    def add_to_weight(self, gradient_OI: Tensor, slope: Tensor, x: Tensor) -> None:
        """The same, added to what is there."""
        a, b = slope.flatten(0, -2).t(), x.flatten(0, -2)
        if emulated(x):
            gradient_OI.copy_(torch.addmm(gradient_OI.float(), a.float(), b.float()))
        else:
            gradient_OI.addmm_(a, b)


EXACT = Products()


@functools.cache
def multiplied_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a half type: a fact, not a measurement, so that runs repeat bit for bit."""
    if not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported())


def emulated(x: Tensor) -> bool:
    """Whether products of such tensors would be emulated."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not multiplied_natively(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, without a gradient of its own."""
    return (a.float() @ b.float()).to(a.dtype) if emulated(a) else a @ b


def widened_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x [..., I] W^T + b of a half type, summed in float32 and rounded once.

    The weight is widened some rows at a time, so that no second copy of it exists: it may lie in a file and be larger than the memory.
    """
    rows = x.flatten(0, -2)
    if len(rows) <= FEW_ROWS and x.dtype == torch.bfloat16:
        return F.linear(x, weight_OI, bias_O)
    wide_MI, bias = rows.float(), None if bias_O is None else bias_O.float()
    many = max(1, CONVERTED // weight_OI.shape[1])
    if weight_OI.shape[0] <= many:
        return F.linear(wide_MI, weight_OI.float(), bias).to(x.dtype).unflatten(0, x.shape[:-1])
    made_MO = x.new_empty(len(rows), weight_OI.shape[0])
    buffer = weight_OI.new_empty(many, weight_OI.shape[1], dtype=torch.float32)
    for start in range(0, weight_OI.shape[0], many):
        part = slice(start, start + many)
        some = weight_OI[part]
        made_MO[:, part] = F.linear(wide_MI, buffer[: len(some)].copy_(some), None if bias is None else bias[part])
    return made_MO.unflatten(0, x.shape[:-1])


class Later(Protocol):
    """Where weight gradients may wait."""

    @property
    def active(self) -> bool:
        """Whether they wait now."""

    def put_off(self, leaf: Any, bias: Tensor | None, slope: Tensor, x: Callable[[], Tensor]) -> None:
        """slope [..., O], x() [..., I]: later the leaf's weight gets their product as gradient, and the bias the sum of slope."""


class Way(Protocol):
    """How the products of a linear leaf are computed."""

    @property
    def products(self) -> Products:
        """Of the outputs and of the gradients."""

    @property
    def later(self) -> Later | None:
        """Where weight gradients may wait."""


@dataclass(frozen=True)
class Plain:
    """A `Way` for weights that are no leaf's."""

    products: Products = EXACT
    later: None = None


PLAIN = Plain()


class _Product(torch.autograd.Function):
    """x W^T + b by a leaf's products; the weight's gradient may wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Way) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        # Not saved: recomputation hands out saved tensors as copies that know no gradient.
        ctx.weight, ctx.bias, ctx.leaf = weight, bias, leaf
        made: Tensor = leaf.products.forward(x, weight, bias)
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x,), leaf, slope = ctx.saved_tensors, ctx.leaf, upstream[0]
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        below = leaf.products.of_inputs(slope, ctx.weight) if needs_x else None
        if leaf.later is not None and leaf.later.active and (needs_weight or needs_bias):
            leaf.later.put_off(leaf, ctx.bias, slope, lambda: x)
            return below, None, None, None
        of_bias = slope.flatten(0, -2).sum(0) if needs_bias else None
        return below, leaf.products.of_weight(slope, x) if needs_weight else None, of_bias, None


_apply_product = torch.compiler.disable(_Product.apply)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, way: Way = PLAIN) -> Tensor:
    """x [..., I] W^T + b."""
    if way.later is None and way.products is EXACT and not emulated(x):
        return F.linear(x, weight_OI, bias_O)
    if not torch.is_grad_enabled():
        return way.products.forward(x, weight_OI, bias_O)
    made: Tensor = _apply_product(x, weight_OI, bias_O, way)
    return made
