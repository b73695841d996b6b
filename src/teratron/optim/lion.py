"""Lion: every weight moves by the same amount, along the sign of a momentum (Chen et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from teratron.config import OptimConfig
from teratron.optim.optimizer import Update
from teratron.optim.segmented import Segmented
from teratron.parallel.flat import FlatModel

NOISE = 1e-12
"""Directions below this share of their tensor's root mean square count as zero: rounding must not walk a weight."""


class Lion(Segmented):
    """With decoupled weight decay. Fused parts are one tensor: a key's bias, which softmax does not see, is noise beside the query's."""

    states: ClassVar = ("moment1",)

    def __init__(self, flat: FlatModel, config: OptimConfig, seed: int = 0) -> None:
        super().__init__(flat, config, seed)
        device = flat.home.device
        self.tensor_of = torch.tensor(self.matrices.tensor_of, dtype=torch.int64, device=device)
        counts = [torch.Size(shape).numel() for shape in self.matrices.shapes]
        self.counts = self.of_tensors(torch.tensor(counts, dtype=torch.float64, device=device))

    def direct(self, gradient: Tensor, state: list[Tensor], weight: Tensor, decay: float, how: Update) -> None:
        (moment,) = state
        direction = moment.lerp(gradient, 1 - self.config.beta1)
        moment.lerp_(gradient, how.gain(1 - self.config.beta2, moment))
        gradient.copy_(direction)

    def weigh(self) -> Tensor:
        (squares,) = self.matrices.squares([bucket.gradient for bucket in self.flat.trained])
        return NOISE * (self.of_tensors(squares) / self.counts).sqrt()

    def of_tensors(self, values: Tensor) -> Tensor:
        """Each slot's sum over all slots of its tensor."""
        return torch.zeros_like(values).index_add(0, self.tensor_of, values)[self.tensor_of]

    def move(self, weight: Tensor, direction: Tensor, number: Tensor, rate: Tensor, decay: float) -> None:
        signs = direction.sign().masked_fill_(direction.abs() < number, 0.0)
        weight.mul_(1 - rate * decay).addcmul_(signs, rate, value=-1)
