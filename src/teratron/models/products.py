"""The matrix products of linear layers and of their gradients: all go through here, where numbers may be rounded and gradients wait.

Shape letters: `leaves.py`; here also I: inputs, O: outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Products:
    """In the operands' own numbers."""

    def forward(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x [..., I] W^T + b."""
        return F.linear(x, weight_OI, bias_O)

    def of_inputs(self, slope: Tensor, weight_OI: Tensor) -> Tensor:
        """The gradient of x, from that of the outputs [..., O]."""
        return slope @ weight_OI

    def of_weight(self, slope: Tensor, x: Tensor) -> Tensor:
        """The weight's gradient [O, I]."""
        return slope.flatten(0, -2).t() @ x.flatten(0, -2)

    def add_to_weight(self, gradient_OI: Tensor, slope: Tensor, x: Tensor) -> None:
        """The same, added to what is there."""
        gradient_OI.addmm_(slope.flatten(0, -2).t(), x.flatten(0, -2))


EXACT = Products()


class Later(Protocol):
    """Where weight gradients may wait."""

    @property
    def active(self) -> bool:
        """Whether they wait now."""

    def put_off(self, leaf: Any, bias: Tensor | None, slope: Tensor, x: Callable[[], Tensor]) -> None:
        """slope [..., O], x() [..., I]: later the leaf's weight gets their product as gradient, and the bias the sum of slope."""


class _Product(torch.autograd.Function):
    """x W^T + b by a leaf's products; the weight's gradient may wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Any) -> Tensor:
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


def product(x: Tensor, leaf: Any, bias: Tensor | None) -> Tensor:
    """x W^T + b of a linear leaf, by its `products`, and with its `later`."""
    if leaf.later is None and leaf.products is EXACT:
        return F.linear(x, leaf.weight, bias)
    made: Tensor = _apply_product(x, leaf.weight, bias, leaf)
    return made
