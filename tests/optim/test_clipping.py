"""Clipping against plain loops over whole tensors in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from trials import made, optimizer_of

from teratron.config import OptimConfig
from teratron.models import parts_of

Gradients = dict[str, Tensor]
RATE = 0.1


def by_value(weights: Gradients, gradients: Gradients, bound: float) -> Gradients:
    return {name: gradient.clamp(-bound, bound) for name, gradient in gradients.items()}


def adaptively(weights: Gradients, gradients: Gradients, bound: float) -> Gradients:
    """Brock et al. 2021, equation 3, a matrix or vector being the unit."""
    clipped = {}
    for name, gradient in gradients.items():
        most = bound * max(float(weights[name].norm()), 1e-3)
        clipped[name] = gradient * min(1.0, most / float(gradient.norm()))
    return clipped


@pytest.mark.parametrize(("by", "bound", "reference"), [("value", 0.02, by_value), ("adaptive", 0.05, adaptively)])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_what_is_clipped(by: str, bound: float, reference: Callable[..., Gradients], loss_scale: float) -> None:
    """By plain gradient descent, whose step is the gradient; the norm that is told is that before clipping."""
    config = OptimConfig(name="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, clip=bound, clip_by=by)  # type: ignore[arg-type]
    model = made()
    optimizer = optimizer_of(model, config)
    draw = torch.Generator().manual_seed(3)
    for bucket in optimizer.flat.trained:
        bucket.gradient.copy_(torch.randn(bucket.gradient.shape, generator=draw, dtype=torch.float64) * 0.03)
    parts = {part.name for part in parts_of(model)}
    gradients = {name: values.clone() for name, values in pieces(optimizer.flat.trained, "gradient").items()}
    before = {name: values.clone() for name, values in pieces(optimizer.flat.trained, "master").items()}
    assert set(gradients) == parts
    for bucket in optimizer.flat.trained:
        bucket.gradient *= loss_scale
    norm = float(optimizer.step(1, RATE, loss_scale))
    assert norm == pytest.approx(sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5)
    expected = reference(before, gradients, bound)
    changed = 0
    for name, after in pieces(optimizer.flat.trained, "master").items():
        torch.testing.assert_close((before[name] - after) / RATE, expected[name], rtol=1e-9, atol=1e-11)
        changed += not torch.equal(expected[name], gradients[name])
    assert changed > 5, "the bound must clip something"


def pieces(buckets: list, of: str) -> Gradients:  # type: ignore[type-arg]
    return {piece.name.partition("/")[2]: piece.values for bucket in buckets for piece in bucket.pieces("x", getattr(bucket, of))}


@pytest.mark.parametrize("by", ["value", "adaptive"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(by: str, bad: float) -> None:
    optimizer = optimizer_of(made(), OptimConfig(clip=0.01, clip_by=by))  # type: ignore[arg-type]
    for bucket in optimizer.flat.trained:
        bucket.gradient.fill_(0.1)
    optimizer.flat.trained[0].gradient[3] = bad
    before = [bucket.master.clone() for bucket in optimizer.flat.buckets]
    assert not torch.isfinite(optimizer.step(1, 0.1))
    assert all(torch.equal(bucket.master, old) for bucket, old in zip(optimizer.flat.buckets, before, strict=True))
