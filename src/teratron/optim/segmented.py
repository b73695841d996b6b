"""Optimizers that need norms of whole tensors: a pass that turns gradients into directions, one sum over ranks, a pass over the weights."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from teratron.optim.optimizer import Optimizer, Update, cached


class Segmented(Optimizer):
    """Subclasses say how a gradient becomes a direction, and how a direction moves the weights."""

    def advance(self, how: Update) -> None:
        self.turn(how)
        numbers = self.weigh()
        for bucket, segments in zip(self.flat.trained, self.matrices.segments, strict=True):
            with self.widened(bucket, how):
                for segment in segments:
                    treatment = self.treatments[segment.part.name]
                    rate = how.gain(how.lr * treatment.lr, bucket.master)
                    own = numbers[segment.slot].to(bucket.exact)
                    for small in cached(segment.place, bucket.master.device):
                        self.move(bucket.master[small], bucket.gradient[small], own, rate, treatment.decay)

    def turn(self, how: Update) -> None:
        """Put directions in the gradients' place, and change the states."""
        for number, bucket in enumerate(self.flat.trained):
            with self.opened(number, how) as state:
                for place, treatment in self.alike[bucket]:
                    for small in cached(place, bucket.master.device):
                        how.clean(bucket.gradient[small])
                        held = [tensor[small] for tensor in state.values()]
                        self.direct(bucket.gradient[small], held, bucket.master[small], treatment.decay, how)

    def direct(self, gradient: Tensor, state: list[Tensor], weight: Tensor, decay: float, how: Update) -> None:
        """The same for ranges of the same elements; for those whose `turn` is this one."""
        raise NotImplementedError

    @abstractmethod
    def weigh(self) -> Tensor:
        """One number for each matrix, [slots], from the directions of all buckets."""

    @abstractmethod
    def move(self, weight: Tensor, direction: Tensor, number: Tensor, rate: Tensor, decay: float) -> None:
        """Change a range of one matrix by its direction and its number. rate: 0 in a step that is passed over."""
