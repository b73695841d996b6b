"""Norms of every part around an update, exact however the parts are cut: of its gradient, its weights, and its relative change."""

from __future__ import annotations

from torch import Tensor

from teratron.checkpoint.agree import gather_json
from teratron.optim import Optimizer


class Norms:
    """A context around one update: entered and left by all ranks together. It keeps a copy of the masters while it lasts."""

    def __init__(self, optimizer: Optimizer, loss_scale: float) -> None:
        """The gradients are those of loss_scale * loss."""
        self.matrices, self.loss_scale = optimizer.matrices, loss_scale
        self.parts: dict[str, list[float]] = {}
        """Of every part of the model, once the update is over: the norm of its gradient before clipping, that of its weights before the
        update, and that of their change over it."""

    def __enter__(self) -> Norms:
        buckets = self.matrices.flat.trained
        self.matrices.flat.home.settle()
        self._masters = [bucket.master.clone() for bucket in buckets]
        self._before = self.matrices.squares([bucket.gradient for bucket in buckets], self._masters)
        return self

    def __exit__(self, *error: object) -> None:
        buckets = self.matrices.flat.trained
        self.matrices.flat.home.settle()
        (changes,) = self.matrices.squares([bucket.master - old for bucket, old in zip(buckets, self._masters, strict=True)])
        del self._masters
        mine = {part: self._row(*self._before[:, slots], changes[slots]) for part, slots in self.matrices.slots().items()}
        for stage in gather_json(self.matrices.flat.mesh.group("pipeline"), mine):
            self.parts |= stage

    def _row(self, *squares: Tensor) -> list[float]:
        """Of a part's gradient, weights and change, the squares of each of its matrices."""
        gradient, weight, change = (float(each.sum().sqrt()) for each in squares)
        return [gradient / self.loss_scale, weight, change / weight if weight else 0.0]
