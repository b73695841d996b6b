"""LAMB: Adam's direction, scaled for each matrix by the norm of its weights over that of the direction (You et al. 2020)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from teratron.optim.optimizer import Update
from teratron.optim.segmented import Segmented


class Lamb(Segmented):
    """Algorithm 2 of the paper, biases and norms included; a weight or direction of zeros counts as a ratio of 1."""

    states: ClassVar = ("moment1", "moment2")

    def direct(self, gradient: Tensor, state: list[Tensor], weight: Tensor, decay: float, how: Update) -> None:
        config, (moment1, moment2) = self.config, state
        moment1.lerp_(gradient, how.gain(1 - config.beta1, moment1))
        moment2.lerp_(gradient.square(), how.gain(1 - config.beta2, moment2))
        root = (moment2 / (1 - config.beta2**how.number)).sqrt_().add_(config.eps)
        torch.div(moment1, root, out=gradient)
        gradient.div_(1 - config.beta1**how.number).add_(weight, alpha=decay)

    def weigh(self) -> Tensor:
        buckets, config = self.flat.trained, self.config
        squares = self.matrices.squares([bucket.master for bucket in buckets], [bucket.gradient for bucket in buckets])
        weights, directions = squares.sqrt()
        ratios = weights.clamp(config.trust_min, config.trust_max) / directions
        return torch.where((weights > 0) & (directions > 0), ratios, torch.ones_like(ratios))

    def move(self, weight: Tensor, direction: Tensor, number: Tensor, rate: Tensor, decay: float) -> None:
        weight.addcmul_(direction, rate * number, value=-1)
