"""What the backward pass needs of a block lies elsewhere until then (`parallel.offload_activations`)."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from teratron.models import Model
from teratron.models.blocks import Block
from teratron.parallel.offload import Home

LEAST = 2**16
"""Smaller tensors, in bytes, stay where they are."""


@dataclass(eq=False)
class Item:
    """A tensor that is away."""

    kept: Tensor
    shape: torch.Size
    before: Callable[[], Item | None]
    """What went out before it, and so is needed after it; None when it is needed no more."""


def no_item() -> None:
    """Nothing went out before."""


def stash(model: Model, home: Home) -> None:
    """Send out what the blocks of a model save for the backward pass, with recomputation only what goes into them."""
    away = Stash(home, model)
    for unit in model.units():
        if isinstance(unit, Block):
            unit.forward = away.watch(unit.forward)  # type: ignore[method-assign]


class Stash:
    """Sends tensors out and brings them back: the last first, the one before it ahead of its use."""

    def __init__(self, home: Home, model: Model) -> None:
        self.home = home
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        """Weights stay: those that are gathered must be what they are when they are needed."""
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)
        self._last: Callable[[], Item | None] = no_item

    def watch(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass whose saved tensors go out."""

        def run(*inputs: Any) -> Any:
            with saved_tensors_hooks(self._pack, self._unpack):
                return forward(*inputs)

        return run

    def _pack(self, tensor: Tensor) -> Tensor | Item:
        if tensor.nbytes < LEAST or tensor.untyped_storage()._cdata in self._weights:
            return tensor
        flat, free = tensor.detach().reshape(-1), self._free[tensor.numel(), tensor.dtype]
        kept = free.pop() if free else self.home.zeros(flat.numel(), flat.dtype)
        self.home.keep(kept, flat)
        self.home.done([kept])
        item = Item(kept, tensor.shape, self._last)
        weakref.finalize(item, free.append, kept)
        self._last = weakref.ref(item)
        return item

    def _unpack(self, packed: Tensor | Item) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        before = packed.before()
        if before is not None:
            self.home.soon([before.kept])
        here = self.home.bring(packed.kept)
        return (here.clone() if here is packed.kept else here).view(packed.shape)
