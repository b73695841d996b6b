"""Schedule-free AdamW: no decay of the learning rate but a running average of the weights (Defazio et al. 2024, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from teratron.config import OptimConfig
from teratron.optim.optimizer import Optimizer, Update, Values, cached
from teratron.parallel.buckets import Bucket
from teratron.parallel.flat import FlatModel


class ScheduleFree(Optimizer):
    """Masters are the average x, by which the model is judged and which is saved; gradients are taken at y = (1 - beta1) z + beta1 x.

    Of each step the average takes the share of its squared learning rate in all until then, warm-up and Adam's correction of the second
    moment included; decay is that of y.
    """

    states: ClassVar = ("moment2", "base")
    """`base` is z, which moves; always in exact numbers."""
    keeps_masters: ClassVar = True

    def __init__(self, flat: FlatModel, config: OptimConfig, seed: int = 0) -> None:
        super().__init__(flat, config, seed)
        for bucket in flat.trained:
            if bucket.master is bucket.shard:
                bucket.master = flat.home.hold(bucket.master)
        self.state["base"] = [flat.home.hold(bucket.master) for bucket in flat.trained]
        self.number_of = {bucket: number for number, bucket in enumerate(flat.trained)}
        self._past = 0, 0.0
        """An update, and the sum of all squared rates until then."""

    def initialise(self, seed: int, values: Values | None = None) -> None:
        super().initialise(seed, values)
        for bucket, base in zip(self.flat.trained, self.state["base"], strict=True):
            base.copy_(bucket.master)
        self.publish()

    def update(self, bucket: Bucket, state: dict[str, Tensor], how: Update) -> None:
        config, exact = self.config, bucket.master
        correction = 1 - config.beta2**how.number
        forget, share = how.gain(1 - config.beta2, exact), how.gain(self.share(how.number), exact)
        for place, treatment in self.alike[bucket]:
            rate = how.gain(how.lr * treatment.lr * math.sqrt(correction), exact)
            for small in cached(place, exact.device):
                average, gradient, moment2, base = (t[small] for t in (exact, bucket.gradient, state["moment2"], state["base"]))
                how.clean(gradient)
                moment2.lerp_(gradient.square(), forget)
                gradient.div_(moment2.sqrt().add_(config.eps))
                if treatment.decay:
                    gradient.add_(torch.lerp(base, average, config.beta1), alpha=treatment.decay)
                base.addcmul_(gradient, rate, value=-1)
                average.lerp_(base, share)

    def share(self, number: int) -> float:
        """What the average takes of an update: a function of its number, whatever was computed before."""
        done, total = self._past if self._past[0] < number else (0, 0.0)
        square = 0.0
        for k in range(done + 1, number + 1):
            square = min(1.0, k / max(int(self.config.warmup_steps), 1)) ** 2 * (1 - self.config.beta2**k)
            total += square
        self._past = number, total
        return square / total if total else 0.0

    def publish(self, frozen: bool = True) -> None:
        self.flat.publish(self.leading, frozen)

    def leading(self, bucket: Bucket) -> Tensor:
        """y, at which gradients are taken; what does not learn has no other weights."""
        if bucket not in self.number_of:
            return bucket.master
        home, base = self.flat.home, self.state["base"][self.number_of[bucket]]
        leading = torch.lerp(home.bring(base), home.bring(bucket.master), self.config.beta1)
        home.done([base])
        return leading

    @contextmanager
    def judged(self) -> Iterator[None]:
        self.flat.publish(frozen=False)
        yield
        self.publish(frozen=False)
