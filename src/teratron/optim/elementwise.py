"""Optimizers that read each element alone: one of PyTorch's fused kernels, once over each range of a bucket that is treated alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from teratron.optim.groups import Treatment
from teratron.optim.optimizer import Optimizer, Update
from teratron.parallel.buckets import Bucket


class Elementwise(Optimizer):
    """One pass over master, gradient and state."""

    def update(self, bucket: Bucket, state: dict[str, Tensor], how: Update) -> None:
        scale = how.scale.to(torch.float32)
        if bucket.exact == torch.float64:  # of which the kernels' own division would lose half the digits
            bucket.gradient /= how.scale
            scale = torch.ones_like(scale)
        for place, treatment in self.alike[bucket]:
            held = [[tensor[place]] for tensor in (bucket.master, bucket.gradient, *state.values())]
            self.run(held, treatment, how, {"grad_scale": scale, "found_inf": how.skip, "maximize": False})

    @abstractmethod
    def run(self, held: list[list[Tensor]], treatment: Treatment, how: Update, options: dict[str, Any]) -> None:
        """The kernel on lists of one: weights, gradients and each state. options: what every kernel takes."""


class AdamW(Elementwise):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    states: ClassVar = ("moment1", "moment2")
    kernel: ClassVar[Callable[..., None]] = torch._fused_adamw_

    def run(self, held: list[list[Tensor]], treatment: Treatment, how: Update, options: dict[str, Any]) -> None:
        config = self.config
        type(self).kernel(
            *held,
            [],
            [torch.tensor(float(how.number), device=how.skip.device)],
            lr=how.lr * treatment.lr,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=treatment.decay,
            eps=config.eps,
            amsgrad=False,
            **options,
        )


class Adam(AdamW):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient (L2)."""

    kernel = torch._fused_adam_


class SGD(Elementwise):
    """Stochastic gradient descent with (Nesterov) momentum; weight decay is added to the gradient (L2)."""

    states: ClassVar = ("moment1",)

    def run(self, held: list[list[Tensor]], treatment: Treatment, how: Update, options: dict[str, Any]) -> None:
        weights, gradients, moments = held
        torch._fused_sgd_(
            weights,
            gradients,
            moments if self.config.momentum else [],  # the kernel takes none without momentum
            lr=how.lr * treatment.lr,
            momentum=self.config.momentum,
            weight_decay=treatment.decay,
            dampening=0.0,
            nesterov=self.config.nesterov,
            is_first_step=False,
            **options,
        )
