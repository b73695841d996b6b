"""Flat buffers: all parameters of a kind in one contiguous tensor, their gradients in another; modules hold views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from teratron.models.leaves import accurate

ROW = 1024
"""Elements whose squares are summed in their own type before float64 takes over."""
SLICE = 2**20
"""Elements added at once where types differ: PyTorch converts the whole operand first, which then stays in the cache."""


class Bucket:
    """Parameters that share dtype and decay, in one buffer.

    `master` is what the optimizer updates: float32 for half types, else the weights themselves. `gradient` is what it reads:
    float32 for half types (accumulated over micro-batches), else the buffer that backward writes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decayed: bool) -> None:
        first = next(iter(parameters.values()))
        self.decayed = decayed
        self.places: dict[str, tuple[int, torch.Size]] = {}
        size = 0
        for name, parameter in parameters.items():
            self.places[name] = (size, parameter.shape)
            size += parameter.numel()
        self.weights = torch.empty(size, dtype=first.dtype, device=first.device)
        self.backward = torch.zeros_like(self.weights)
        for name, parameter in parameters.items():
            view = self.view(self.weights, name)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.view(self.backward, name)
        self.master = self.weights.to(accurate(first.dtype))
        self.gradient = self.backward if self.master is self.weights else torch.zeros_like(self.master)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """A parameter's view of a tensor shaped like the buffer."""
        start, shape = self.places[name]
        return flat[start : start + shape.numel()].view(shape)

    def collect(self) -> None:
        """After each backward pass of half types: move its gradient into the float32 sum."""
        if self.gradient is not self.backward:
            for total, part in zip(self.gradient.split(SLICE), self.backward.split(SLICE), strict=True):
                total += part
            self.backward.zero_()

    def publish(self) -> None:
        """After an update of the masters: round them into the weights that the model uses."""
        if self.master is not self.weights:
            self.weights.copy_(self.master)

    def clear(self) -> None:
        self.gradient.zero_()


def flatten(model: nn.Module) -> list[Bucket]:
    """Move a model's trained parameters into buckets by dtype and decay (matrices, not biases and norms: Megatron-LM's rule)."""
    kinds: dict[tuple[torch.dtype, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault((parameter.dtype, parameter.dim() > 1), {})[name] = parameter
    return [Bucket(parameters, decayed) for (_, decayed), parameters in kinds.items()]


def global_norm(buckets: Iterable[Bucket]) -> Tensor:
    """The 2-norm of all gradients together; a scalar tensor."""
    return torch.stack([_norm(bucket.gradient) for bucket in buckets]).norm()


def _norm(flat: Tensor) -> Tensor:
    """Row by row, then the rows in float64: PyTorch's own float32 sum of 10^8 squares is off by 0.5 %, and differs with any cut."""
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double().norm()
    return torch.hypot(rows, flat[whole:].double().norm())
