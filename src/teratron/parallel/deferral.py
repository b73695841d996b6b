"""Weight gradients that wait: a pipeline may send the gradients of inputs first and make those of weights when it would be idle."""

from __future__ import annotations

from collections.abc import Callable

import torch
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

    def put_off(self, leaf: Linear, bias: Tensor | None, slope: Tensor, x: Callable[[], Tensor]) -> None:
        """slope [..., out], x() [..., in]: later the weight's gradient gets their product, and the bias's the sum of slope."""

        def make() -> None:
            with torch.no_grad():
                if leaf.weight.requires_grad:
                    leaf.products.add_to_weight(_gradient(leaf.weight), slope, x())
                if bias is not None and bias.requires_grad:
                    _gradient(bias).add_(slope.flatten(0, -2).sum(0))

        if self._waiting is not None:
            self._waiting.append(make)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a weight gradient was put off for a parameter that lies in no bucket")
    return parameter.grad


def defer(model: nn.Module, later: Deferral) -> None:
    """Let the weight gradients of all linear layers of a model wait."""
    for leaf in model.modules():
        if isinstance(leaf, Linear):
            leaf.later = later
