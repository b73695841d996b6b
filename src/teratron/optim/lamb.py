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
        config, (moment1, moment2), adam = self.config, state, torch.zeros_like(gradient)
        torch._fused_adam_(  # from weights of zero, at a rate of -1: what is left there is Adam's direction, in one pass
            [adam],
            [gradient],
            [moment1],
            [moment2],
            [],
            [torch.tensor(float(how.number), device=gradient.device)],
            lr=-1.0,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=0.0,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
            found_inf=how.skip,
        )
        torch.add(adam, weight, alpha=decay, out=gradient)

    def weigh(self) -> Tensor:
        buckets, config = self.flat.trained, self.config
        squares = self.matrices.squares([bucket.master for bucket in buckets], [bucket.gradient for bucket in buckets])
        weights, directions = squares.sqrt()
        ratios = weights.clamp(config.trust_min, config.trust_max) / directions
        return torch.where((weights > 0) & (directions > 0), ratios, torch.ones_like(ratios))

    def move(self, weight: Tensor, direction: Tensor, number: Tensor, rate: Tensor, decay: float) -> None:
        weight.addcmul_(direction, rate * number, value=-1)
