"""AdamW: an elementwise optimizer, one fused pass over each range of a bucket that decays alike."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from teratron.optim.optimizer import Optimizer
from teratron.parallel.buckets import Bucket


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind = "elementwise"
    states: ClassVar = ("moment1", "moment2")

    def update(self, bucket: Bucket, state: dict[str, Tensor], number: int, lr: float) -> None:
        config = self.config
        for place, decayed in bucket.decay_ranges():
            torch._fused_adamw_(
                [bucket.master[place]],
                [bucket.gradient[place]],
                [state["moment1"][place]],
                [state["moment2"][place]],
                [],
                [torch.tensor(float(number), device=bucket.master.device)],
                lr=lr,
                beta1=config.beta1,
                beta2=config.beta2,
                weight_decay=config.weight_decay if decayed else 0.0,
                eps=config.eps,
                amsgrad=False,
                maximize=False,
            )
