"""Clipping of gradients, exact however they are cut: by the global norm, element by element, or matrix by matrix (`optim.clip_by`)."""

from __future__ import annotations

import torch
from torch import Tensor

from teratron.optim.matrices import Matrices
from teratron.parallel.flat import FlatModel

LEAST = 1e-3
"""Norm that weights are taken to have at least in adaptive clipping, so that what begins as zeros can learn."""


def norm_excess(norm: Tensor, bound: float) -> Tensor:
    """What all gradients are to be divided by, at least 1, so that their global norm is at most the bound."""
    return ((norm + 1e-6) / bound).clamp(min=1.0)


def clip_values(flat: FlatModel, bound: float) -> None:
    """Bring every element of the gradients into -bound..bound."""
    for bucket in flat.trained:
        bucket.gradient.clamp_(-bound, bound)


def clip_adaptively(matrices: Matrices, bound: float, loss_scale: float) -> None:
    """Shorten the gradient of each matrix or vector whose norm exceeds bound times that of its weights (Brock et al. 2021).

    The paper bounds rows; here a unit is what an optimizer such as LAMB sees as one, of stacked experts each. The gradients are those of
    loss_scale * loss.
    """
    buckets = matrices.flat.trained
    weights, gradients = matrices.squares([bucket.master for bucket in buckets], [bucket.gradient for bucket in buckets]).sqrt()
    factors = (bound * loss_scale * weights.clamp(min=LEAST) / gradients.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    for bucket, segments in zip(buckets, matrices.segments, strict=True):
        for segment in segments:
            bucket.gradient[segment.place] *= factors[segment.slot].to(bucket.gradient.dtype)
