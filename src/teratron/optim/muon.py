"""Muon: the momentum of each matrix is made orthogonal (Jordan et al. 2024; scaled as Liu et al. 2025); AdamW for all else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from teratron.config import OptimConfig
from teratron.optim.elementwise import AdamW
from teratron.optim.groups import Treatment
from teratron.optim.matrices import Segment, packed
from teratron.optim.optimizer import Update, cached
from teratron.optim.ownership import Ownership
from teratron.parallel.boxes import Piece
from teratron.parallel.buckets import Bucket
from teratron.parallel.flat import FlatModel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
"""The quintic iteration and its length, as published: singular values end between about 0.7 and 1.2."""
LEAST = 1e-7
"""A matrix of a smaller norm is taken for zero."""


class Muon(AdamW):
    """Embeddings, output projections, norms and biases are AdamW's, with `optim.adam_lr`. Fused parts are matrices of their own."""

    def __init__(self, flat: FlatModel, config: OptimConfig, seed: int = 0) -> None:
        super().__init__(flat, config, seed)
        self.ownership = Ownership(self.matrices, lambda segment: segment.part.inner, flops)
        self.rest = [packed(segment for segment in segments if not segment.part.inner) for segments in self.matrices.segments]
        """Of every trained bucket what is AdamW's, with its place in the second moments, of which there are no others."""
        self.state["moment2"] = [
            self.fresh(bucket, sum(s.place.stop - s.place.start for s, _ in rest))
            for bucket, rest in zip(flat.trained, self.rest, strict=True)
        ]

    def state_pieces(self, name: str, number: int, flat: Tensor) -> Iterator[Piece]:
        if name == "moment1":
            yield from super().state_pieces(name, number, flat)
            return
        first = self.flat.trained[number].sharding.copies.rank == 0
        for segment, place in self.rest[number]:
            part = segment.part
            yield Piece(f"{name}/{part.name}", part.shape, segment.boxes, flat[place], part.first and first)

    def advance(self, how: Update) -> None:
        for number, bucket in enumerate(self.flat.trained):
            how.clean(bucket.gradient)
            with self.opened(number, how) as state:
                self.adapt(bucket, self.rest[number], state, how)
                for segment in (segment for own, segment in self.ownership.mine if own == number):
                    self.gather_speed(bucket, state["moment1"], segment.place, how)
        if not self.flat.trained:
            return
        first = self.flat.trained[0]
        dtype = first.exact if first.weights.dtype == first.exact else torch.bfloat16
        self.ownership.change([bucket.gradient for bucket in self.flat.trained], dtype, orthogonalised)
        for number, bucket in enumerate(self.flat.trained):
            with self.widened(bucket, how):
                for segment in (segment for own, segment in self.ownership.mine if own == number):
                    self.move(bucket, segment, how)

    def adapt(self, bucket: Bucket, rest: list[tuple[Segment, slice]], state: dict[str, Tensor], how: Update) -> None:
        """AdamW on what is not Muon's."""
        factor = self.config.adam_lr / self.config.lr if self.config.adam_lr else 1.0
        options: dict[str, Any] = {"found_inf": how.skip, "maximize": False}
        for segment, place in rest:
            treatment = self.treatments[segment.part.name]
            flats = bucket.master[segment.place], bucket.gradient[segment.place], state["moment1"][segment.place], state["moment2"][place]
            self.run([[flat] for flat in flats], Treatment(treatment.lr * factor, treatment.decay), how, options)

    def gather_speed(self, bucket: Bucket, moments: Tensor, place: slice, how: Update) -> None:
        """The momentum, and in the gradient's place what is to be made orthogonal."""
        momentum = self.config.momentum
        for small in cached(place, moments.device):
            moment, gradient = moments[small], bucket.gradient[small]
            moment.lerp_(gradient, how.gain(1 - momentum, moment))
            gradient.lerp_(moment, momentum if self.config.nesterov else 1.0)

    def move(self, bucket: Bucket, segment: Segment, how: Update) -> None:
        treatment = self.treatments[segment.part.name]
        rate = how.gain(how.lr * treatment.lr, bucket.master)
        factor = scale(segment.part.shape[-2:], self.config)
        for small in cached(segment.place, rate.device):
            weight = bucket.master[small]
            weight.mul_(1 - rate * treatment.decay).addcmul_(bucket.gradient[small], rate * factor, value=-1)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Close to U V^T of each U S V^T, [batch, rows, columns]: a Newton-Schulz iteration on the shorter side."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def scale(shape: tuple[int, ...], config: OptimConfig) -> float:
    """Factor of the learning rate of a matrix [rows, columns]: one so that AdamW's rates suit, or Jordan's."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if config.muon_scale == "moonlight" else math.sqrt(max(1.0, rows / columns))


def flops(shape: tuple[int, ...]) -> float:
    """Of `orthogonalised`, up to a factor."""
    return math.prod(shape) * min(shape) + 0.5 * float(min(shape)) ** 3
