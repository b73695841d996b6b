"""Weights without float32 masters: bfloat16 alone learns what they would, since rounding is right on the mean."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from trials import learn, loss_of, made, optimizer_of

from teratron.config import OptimConfig
from teratron.optim import OPTIMIZERS, Optimizer
from teratron.train.timing import state_bytes

NAMES = [name for name in OPTIMIZERS if name != "schedule_free"]


def learnt(name: Any, masters: Literal["fp32", "bf16"], steps: int, lr: float = 1e-3) -> Optimizer:
    optimizer = optimizer_of(made(torch.bfloat16), OptimConfig(name=name, masters=masters, weight_decay=0.0))
    optimizer.initialise(1)
    for bucket in optimizer.flat.buckets:
        bucket.master.copy_(bucket.shard)  # all begin with the same numbers, those that bfloat16 holds
    for step in range(1, steps + 1):
        learn(optimizer, step, step, lr)
    return optimizer


def weights(optimizer: Optimizer) -> dict[str, Tensor]:
    return {piece.name: piece.values.clone() for piece in optimizer.pieces() if piece.name.startswith("weight/")}


@pytest.mark.parametrize("name", NAMES)
def test_no_optimizer_keeps_masters(name: str) -> None:
    optimizer = learnt(name, "bf16", 2)
    assert {values.dtype for values in weights(optimizer).values()} == {torch.bfloat16}
    for bucket in optimizer.flat.buckets:
        assert bucket.master is bucket.shard
    kept = {values.dtype for flats in optimizer.state.values() for values in flats}
    assert kept <= {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_update_is_right_on_the_mean(name: str) -> None:
    """Of all weights together: up or down by chance each, but in sum where exact masters go."""
    start = weights(learnt(name, "bf16", 0))
    lr = 0.01 if name == "sgd" else 1e-4
    exact, ours = weights(learnt(name, "fp32", 1, lr)), weights(learnt(name, "bf16", 1, lr))
    moved = torch.cat([exact[key] - start[key].float() for key in start])
    off = torch.cat([ours[key].float() - exact[key] for key in start])
    spacing = torch.cat([torch.ldexp(torch.ones_like(exact[key]), torch.frexp(exact[key]).exponent - 8) for key in start])
    assert (off.abs() <= spacing).all()
    # The rounding of each is independent, its variance at most spacing^2 / 4: five standard deviations along the way that was to be gone.
    assert abs(float(off @ moved)) < 5 * float(((spacing * moved) ** 2).sum().sqrt() / 2)


def test_steps_below_the_numbers_spacing_are_not_lost() -> None:
    """Rounded to the nearest no weight of about 0.3 would ever move by 1e-4; at random they go the whole way on the mean."""
    start = weights(learnt("lion", "bf16", 0))["weight/blocks.0.ffn.up.weight"].float()
    exact, ours = (weights(learnt("lion", kind, 10, 1e-4))["weight/blocks.0.ffn.up.weight"].float() for kind in ("fp32", "bf16"))
    gone = (exact - start) @ (ours - start) / (exact - start).square().sum()
    assert 0.5 < float(gone) < 1.5


def test_memory_falls_by_four_bytes_a_parameter() -> None:
    found = {masters: state_bytes(optimizer_of(made(torch.bfloat16), OptimConfig(masters=masters))) for masters in ("fp32", "bf16")}  # type: ignore[arg-type]
    count = sum(bucket.weights.numel() for bucket in optimizer_of(made(torch.bfloat16)).flat.buckets)
    assert found["fp32"][:2] == found["bf16"][:2]
    assert found["fp32"][2] - found["bf16"][2] == 4 * count


def test_gradients_of_many_micro_batches_are_summed_in_float32() -> None:
    """The thousandth equal gradient still counts: in bfloat16 a sum would stand still at 256 times one of them."""
    optimizer = optimizer_of(made(torch.bfloat16))
    model = optimizer.flat.stages.stages()[0]
    once = []
    for number in range(600):
        optimizer.flat.backward(0, [loss_of(model, 1)], [None], last=number == 599)
        if number == 0:
            once = [bucket.total.clone() for bucket in optimizer.flat.trained]
    optimizer.flat.finish()
    for bucket, one in zip(optimizer.flat.trained, once, strict=True):
        assert bucket.gradient.dtype == torch.float32
        torch.testing.assert_close(bucket.gradient, 600 * one, rtol=1e-4, atol=0)
