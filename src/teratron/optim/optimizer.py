"""What every optimizer is: state per part on the owned slices of flat buckets, clipping by the global norm (contract C11)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from teratron.config import OptimConfig
from teratron.models import initial_values
from teratron.parallel.boxes import Piece
from teratron.parallel.buckets import Bucket
from teratron.parallel.flat import FlatModel

ROW = 1024
"""Elements whose squares are summed in their own type before float64 takes over."""


class Optimizer:
    """Updates the masters of a model's buckets. A family of optimizers is a subclass with `kind`, `states` and `update`."""

    kind: ClassVar[Literal["elementwise", "segmented", "whole-matrix"]]
    """What an update reads: each element alone, norms per part, or whole matrices."""
    states: ClassVar[tuple[str, ...]]
    """Names of the tensors that it keeps for every part."""

    def __init__(self, flat: FlatModel, config: OptimConfig) -> None:
        self.flat, self.config = flat, config
        self.state = {name: [torch.zeros_like(bucket.master) for bucket in flat.trained] for name in self.states}

    def update(self, bucket: Bucket, state: dict[str, Tensor], number: int, lr: float) -> None:
        """Change a bucket's master by its gradient, as the number-th update (from 1)."""
        raise NotImplementedError

    def step(self, number: int, lr: float, loss_scale: float = 1.0) -> float:
        """Clip, update, publish, clear the gradients; returns the norm before clipping, the same on every rank.

        The gradients are those of loss_scale * loss. With a norm that is not finite nothing changes but the gradients are cleared.
        """
        norm = global_norm(self.flat) / loss_scale
        if math.isfinite(norm):
            clip = min(1.0, self.config.clip / (norm + 1e-6)) if self.config.clip else 1.0
            for place, bucket in enumerate(self.flat.trained):
                if clip != loss_scale:
                    bucket.gradient *= clip / loss_scale
                self.update(bucket, {name: flats[place] for name, flats in self.state.items()}, number, lr)
            self.flat.publish()
        self.flat.clear()
        return norm

    def pieces(self) -> list[Piece]:
        """The training state that this rank owns: `weight/PART` in master precision, and `STATE/PART` for every state."""
        return list(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        for bucket in self.flat.buckets:
            yield from bucket.pieces("weight", bucket.master)
        for name, flats in self.state.items():
            for bucket, flat in zip(self.flat.trained, flats, strict=True):
                yield from bucket.pieces(name, flat)

    def initialise(self, seed: int) -> None:
        """Initial values of all weights, each rank its own slices (contract C8), and fresh states."""
        for bucket in self.flat.buckets:
            for part, boxes, place in bucket.owned():
                target = bucket.master[place]
                for box in boxes:
                    target[: box.count] = initial_values(part, seed, box.slices()).flatten()
                    target = target[box.count :]
        for flat in (flat for flats in self.state.values() for flat in flats):
            flat.zero_()
        self.flat.publish()


def global_norm(flat: FlatModel) -> float:
    """The 2-norm of all gradients together, each element counted once over all ranks; the same on every rank."""
    ranges = [(b, place, held * b.sharding.copies.size) for b in flat.trained for place, held in b.norm_ranges()]
    squares = [_square(bucket.gradient[place]) / copies for bucket, place, copies in ranges]
    device = flat.buckets[0].master.device
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    flat.mesh.all.sum(total).wait()
    return math.sqrt(float(total)) if float(total) >= 0 else math.nan


def _square(flat: Tensor) -> Tensor:
    """Row by row, then the rows in float64: PyTorch's own float32 sum of 10^8 squares is off by 0.5 %, and differs with any cut."""
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double()
    return rows.square().sum() + flat[whole:].double().square().sum()
