"""Weight gradients that wait: a pipeline may send the gradients of inputs first and make those of weights when it would be idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.leaves import Linear


class Deferral:
    """Collects the products of weight gradients between `begin` and `take`; otherwise they are made at once."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] | None = None

    @property
    def active(self) -> bool:
        return self._waiting is not None

    def begin(self) -> None:
        self._waiting = []

    def take(self) -> list[Callable[[], None]]:
        """What has been put off; calling each adds to the parameters' gradients."""
        waiting, self._waiting = self._waiting or [], None
        return waiting

    def put_off(self, weight: nn.Parameter, bias: nn.Parameter | None, slope: Tensor, x: Callable[[], Tensor]) -> None:
        """slope [..., out], x() [..., in]: later the weight's gradient gets their product, and the bias's the sum of slope."""

        def make() -> None:
            with torch.no_grad():
                flat = slope.flatten(0, -2)
                if weight.requires_grad:
                    _gradient(weight).addmm_(flat.t(), x().flatten(0, -2))
                if bias is not None and bias.requires_grad:
                    _gradient(bias).add_(flat.sum(0))

        if self._waiting is not None:
            self._waiting.append(make)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a weight gradient was put off for a parameter that lies in no bucket")
    return parameter.grad


class _Product(torch.autograd.Function):
    """x W^T + b, whose weight gradient may wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: Deferral) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved: recomputation hands out saved tensors as copies that know no gradient.
        ctx.weight, ctx.bias, ctx.later = weight, bias, later
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (x,), weight, slope = ctx.saved_tensors, ctx.weight, upstream[0]
        if ctx.later.active:
            ctx.later.put_off(weight, ctx.bias, slope, lambda: x)
            return slope @ weight, None, None, None
        flat = slope.flatten(0, -2)
        return slope @ weight, flat.t() @ x.flatten(0, -2), flat.sum(0) if ctx.needs_input_grad[2] else None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def product(x: Tensor, weight: Tensor, bias: Tensor | None, later: Deferral | None) -> Tensor:
    """x W^T + b; with `later` the weight's gradient may be put off."""
    return F.linear(x, weight, bias) if later is None else _Product.apply(x, weight, bias, later)


class DeferringLinear(Linear):
    """The twin of a linear layer that is not cut."""

    def __init__(self, leaf: Linear, later: Deferral) -> None:
        super().__init__(leaf.weight.shape[1], leaf.widths, leaf.bias is not None, leaf.std, leaf.granule)
        self.later, self.pieces = later, leaf.pieces

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, self.later)


def defer(model: nn.Module, later: Deferral) -> None:
    """Let the weight gradients of all linear layers of a model on the meta device wait."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is Linear:
                with torch.device("meta"):
                    setattr(module, name, DeferringLinear(child, later).to(child.weight.dtype))
            elif isinstance(child, Linear):
                child.__dict__["later"] = later  # its twins have this attribute
