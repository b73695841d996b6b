"""AdamW on flat buckets equals torch's, loses no small update, and passes over a step that is not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from trials import CONFIG, learn, loss_of, made, optimizer_of

from teratron.config import OptimConfig
from teratron.models import build_model, initialise, parts_of
from teratron.optim import Optimizer

HALVES = [torch.bfloat16, torch.float16]


def torch_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def numbers(optimizer: Optimizer) -> dict[str, Tensor]:
    """Masters and moments, and the weights that the model computes with."""
    state = {piece.name: piece.values.clone() for piece in optimizer.pieces()}
    return state | {name: parameter.detach().clone() for name, parameter in optimizer.flat.stages.stages()[0].named_parameters()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("tied", [True, False])
def test_twenty_steps_equal_torchs_adamw_with_clipping_and_decay(tied: bool, loss_scale: float) -> None:
    config = OptimConfig(lr=3e-3, weight_decay=0.3, beta1=0.8, beta2=0.95, clip=1.0)
    model = made(tie_embeddings=tied)
    oracle = copy.deepcopy(model)
    optimizer, expected = optimizer_of(model, config), torch_adamw(oracle, config)
    norms = []
    for step in range(1, 21):
        rate, scale = config.lr / step, 2.0 if step % 2 else 0.05  # every other step is clipped
        loss_of(oracle, step, scale).backward()
        right = float(nn.utils.clip_grad_norm_(oracle.parameters(), config.clip))
        for group in expected.param_groups:
            group["lr"] = rate
        expected.step()
        expected.zero_grad()
        optimizer.flat.backward(0, [loss_of(model, step, scale * loss_scale)], [None], last=True)
        optimizer.flat.finish()
        norms.append(float(optimizer.step(step, rate, loss_scale)))
        assert norms[-1] == pytest.approx(right, rel=1e-12)
    assert min(norms) < config.clip < max(norms)
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.detach().abs().max()), msg=name)
        assert ours.grad is not None
        assert (ours.grad == 0).all()


def test_clip_zero_is_no_clipping() -> None:
    results = []
    for clip in (0.0, 1e9):
        optimizer = optimizer_of(made(), OptimConfig(clip=clip))
        optimizer.flat.backward(0, [loss_of(optimizer.flat.stages.stages()[0], 0, 100.0)], [None], last=True)
        optimizer.flat.finish()
        assert optimizer.step(1, 1e-3) > 10
        results.append(numbers(optimizer))
    assert differing(*results) == []


def test_only_matrices_are_decayed() -> None:
    model = made()
    optimizer = optimizer_of(model, OptimConfig(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step(1, 0.1)  # without gradients only the decay acts
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.dim() > 1 else 1.0), msg=name)


@pytest.mark.parametrize("dtype", HALVES)
def test_masters_of_half_types_keep_updates_that_rounding_would_lose(dtype: torch.dtype) -> None:
    model = made(dtype)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    optimizer = optimizer_of(model, OptimConfig(weight_decay=0.0, clip=0.0))
    assert torch.tensor(1.0 - 1e-4).to(dtype) == 1  # one step alone vanishes
    for step in range(1, 201):
        for bucket in optimizer.flat.trained:
            bucket.backward.fill_(1.0)
            bucket.collect()
        optimizer.step(step, 1e-4)
    for piece in optimizer.pieces():
        if piece.name.startswith("weight/"):
            assert piece.values.dtype == torch.float32
            torch.testing.assert_close(piece.values, torch.full(piece.values.shape, 0.98), rtol=0, atol=1e-5)
    for part in parts_of(model):
        values = part.of(model.get_parameter(part.parameter).detach())
        assert values.dtype == dtype
        torch.testing.assert_close(values.float(), torch.full(part.shape, 0.98), rtol=0, atol=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, value: float) -> None:
    optimizer = optimizer_of(made(dtype))
    learn(optimizer, 1, 1, 1e-3)
    before = numbers(optimizer)
    optimizer.flat.stages.stages()[0].get_parameter("blocks.0.attention.qkv.weight").grad[3, 5] = value  # type: ignore[index]
    assert not math.isfinite(learn(optimizer, 2, 2, 1e-3))
    assert differing(before, numbers(optimizer)) == []
    assert all((bucket.gradient == 0).all() and (bucket.backward == 0).all() for bucket in optimizer.flat.trained)
    assert 0 < learn(optimizer, 3, 2, 1e-3) < math.inf
    assert differing(before, numbers(optimizer)) != []


def test_pieces_hold_every_part_three_times_and_loading_them_restores_the_run() -> None:
    optimizer = optimizer_of(made(torch.bfloat16))
    for step in (1, 2):
        learn(optimizer, step, step, 1e-2)
    names = [piece.name for piece in optimizer.pieces()]
    assert sorted(names) == sorted(
        f"{kind}/{part.name}" for kind in ("weight", "moment1", "moment2") for part in optimizer.flat.stages.parts()
    )
    restored = optimizer_of(made(torch.bfloat16))
    for target, source in zip(restored.pieces(), optimizer.pieces(), strict=True):
        target.values.copy_(source.values)
    restored.flat.publish()
    for each in (optimizer, restored):
        learn(each, 3, 3, 1e-2)
    assert differing(numbers(optimizer), numbers(restored)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_initialise_gives_the_models_initial_values_and_forgets_the_past(dtype: torch.dtype) -> None:
    model = build_model(CONFIG, device="meta", dtype=dtype)
    optimizer = optimizer_of(model)
    optimizer.initialise(7)
    learn(optimizer, 1, 1, 1e-2)
    optimizer.initialise(5)
    expected = build_model(CONFIG, dtype=dtype)
    initialise(expected, 5)
    for (name, right), found in zip(expected.named_parameters(), optimizer.flat.stages.stages()[0].parameters(), strict=True):
        assert torch.equal(found, right), name
    moments = [piece.values for piece in optimizer.pieces() if piece.name.startswith("moment")]
    assert len(moments) == 2 * len(optimizer.flat.stages.parts())
    assert not any(values.any() for values in moments)
