"""Schedule-free AdamW: the average is that of the paper, is what is saved and judged by, and says nothing to training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trials import learn, loss_of, made, optimizer_of

from teratron.config import OptimConfig
from teratron.optim import Optimizer

CONFIG = OptimConfig(name="schedule_free", schedule="constant", warmup_steps=3)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def learnt(dtype: torch.dtype, steps: int) -> Optimizer:
    optimizer = optimizer_of(made(dtype), CONFIG)
    optimizer.initialise(1)
    for step in range(1, steps + 1):
        learn(optimizer, step, step, 1e-2)
    return optimizer


def held(optimizer: Optimizer, kind: str) -> dict[str, Tensor]:
    return {piece.name: piece.values.clone() for piece in optimizer.pieces() if piece.name.startswith(f"{kind}/")}


def used(optimizer: Optimizer) -> Tensor:
    """The weights that the model computes with."""
    return torch.cat([bucket.weights for bucket in optimizer.flat.buckets]).clone()


def test_what_is_saved_is_the_weighted_mean_of_all_bases() -> None:
    optimizer = learnt(torch.float64, 0)
    total, sums = 0.0, {name: torch.zeros_like(values) for name, values in held(optimizer, "base").items()}
    for step in range(1, 8):
        learn(optimizer, step, step, 1e-2)
        weight = min(1, step / 3) ** 2 * (1 - CONFIG.beta2**step)
        total += weight
        for name, values in held(optimizer, "base").items():
            sums[name] += weight * values
    for name, values in held(optimizer, "weight").items():
        torch.testing.assert_close(values, sums[name.replace("weight/", "base/", 1)] / total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_judged_by_the_average_and_goes_on_as_if_it_had_not_been(dtype: torch.dtype) -> None:
    optimizer = learnt(dtype, 4)
    model, before = optimizer.flat.stages.stages()[0], used(optimizer)
    average = torch.cat([bucket.master for bucket in optimizer.flat.buckets]).to(dtype)
    with optimizer.judged(), torch.no_grad():
        assert torch.equal(used(optimizer), average)
        judged = loss_of(model, 9).item()
    assert not torch.equal(before, average)
    assert torch.equal(used(optimizer), before)
    plain = optimizer_of(made(dtype))
    for target, values in zip((piece.values for piece in plain.pieces()), held(optimizer, "weight").values(), strict=False):
        target.copy_(values)
    plain.publish()
    assert judged == loss_of(plain.flat.stages.stages()[0], 9).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    whole, part = learnt(dtype, 4), learnt(dtype, 4)
    resumed = optimizer_of(made(dtype), CONFIG)
    for target, source in zip(resumed.pieces(), part.pieces(), strict=True):
        target.values.copy_(source.values)
    resumed.publish()
    for step in (5, 6):
        learn(whole, step, step, 1e-2)
        learn(resumed, step, step, 1e-2)
    for a, b in zip(whole.pieces(), resumed.pieces(), strict=True):
        assert torch.equal(a.values, b.values), a.name
    assert torch.equal(used(whole), used(resumed))
