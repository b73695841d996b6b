"""AdamW on flat buckets: an elementwise optimizer (contract C11), one fused pass over each bucket."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from teratron.config import OptimConfig
from teratron.models import Part, parts_of
from teratron.optim.flat import Bucket, flatten, global_norm


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) and clipping by the global norm.

    Takes over the model's parameters: they become views of its buckets, and so do their gradients.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.parts = parts_of(model)
        self.buckets = flatten(model)
        self.frozen = {name: parameter.data for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.moments = [(torch.zeros_like(bucket.master), torch.zeros_like(bucket.master)) for bucket in self.buckets]

    def step(self, step: int, lr: float) -> float:
        """Clip, update as the step-th step (from 1), clear the gradients; returns the norm before clipping.

        With a norm that is not finite nothing changes but the gradients are cleared.
        """
        norm = float(global_norm(self.buckets))
        if math.isfinite(norm):
            scale = min(1.0, self.config.clip / (norm + 1e-6)) if self.config.clip else 1.0
            for bucket, (first, second) in zip(self.buckets, self.moments, strict=True):
                if scale < 1.0:
                    bucket.gradient *= scale
                self._update(bucket, first, second, step, lr)
                bucket.publish()
        for bucket in self.buckets:
            bucket.clear()
        return norm

    def _update(self, bucket: Bucket, first: Tensor, second: Tensor, step: int, lr: float) -> None:
        config = self.config
        torch._fused_adamw_(
            [bucket.master],
            [bucket.gradient],
            [first],
            [second],
            [],
            [torch.tensor(float(step), device=bucket.master.device)],
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=config.weight_decay if bucket.decayed else 0.0,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
        )

    def collect(self) -> None:
        """After each micro-batch's backward pass."""
        for bucket in self.buckets:
            bucket.collect()

    def tensors(self) -> Iterator[tuple[str, Part, Tensor]]:
        """The training state per part: (`weight` | `moment1` | `moment2`, part, view in master precision)."""
        for bucket, (first, second) in zip(self.buckets, self.moments, strict=True):
            for part in (p for p in self.parts if p.parameter in bucket.places):
                for kind, flat in (("weight", bucket.master), ("moment1", first), ("moment2", second)):
                    yield kind, part, part.of(bucket.view(flat, part.parameter))
        for part in (p for p in self.parts if p.parameter in self.frozen):
            yield "weight", part, part.of(self.frozen[part.parameter])

    def zero(self) -> None:
        """Before loading into `tensors()`: what they do not cover, the padding of the vocabulary, is zero."""
        for bucket, moments in zip(self.buckets, self.moments, strict=True):
            for flat in (bucket.master, *moments):
                flat.zero_()

    def publish(self) -> None:
        """After loading into `tensors()`: round the masters into the model's weights."""
        for bucket in self.buckets:
            bucket.publish()
