"""AdamW on flat buffers equals torch's, loses no small update, and passes over a step that is not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from teratron.config import ModelConfig, OptimConfig
from teratron.models import GPT, build_model, initialise
from teratron.models.leaves import Linear
from teratron.optim import AdamW

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, seq_length=8, vocab_size=30, vocab_multiple=16, init_std=0.3, position="rope")
"""With rotary positions every parameter has a gradient; a key bias without them has rounding errors only, which Adam magnifies."""


def made(dtype: torch.dtype = torch.float64, **changes: bool) -> GPT:
    model = build_model(ModelConfig(**{**vars(CONFIG), **changes}), dtype=dtype)
    initialise(model, 1)
    return model


def one_linear(value: float, dtype: torch.dtype) -> nn.Sequential:
    model = nn.Sequential(Linear(4, 4, True, 0.02)).to(dtype)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def backward(model: GPT, seed: int, scale: float = 1.0) -> None:
    """Gradients of a random batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, 3, CONFIG.seq_length), generator=generator)
    hidden = model({"tokens": tokens, "positions": torch.arange(CONFIG.seq_length).expand(3, -1)})["hidden"]
    assert model.head is not None
    (model.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) * scale / targets.numel()).backward()


def torch_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


@pytest.mark.parametrize("tied", [True, False])
def test_twenty_steps_equal_torchs_adamw_with_clipping_and_decay(tied: bool) -> None:
    config = OptimConfig(lr=3e-3, weight_decay=0.3, beta1=0.8, beta2=0.95, clip=1.0)
    model = made(tie_embeddings=tied)
    oracle = copy.deepcopy(model)
    optimizer, expected = AdamW(model, config), torch_adamw(oracle, config)
    norms = []
    for step in range(1, 21):
        rate, scale = config.lr / step, 2.0 if step % 2 else 0.05  # every other step is clipped
        backward(model, step, scale)
        backward(oracle, step, scale)
        right = float(nn.utils.clip_grad_norm_(oracle.parameters(), config.clip))
        for group in expected.param_groups:
            group["lr"] = rate
        expected.step()
        expected.zero_grad()
        optimizer.collect()
        norms.append(optimizer.step(step, rate))
        assert norms[-1] == pytest.approx(right, rel=1e-12)
    assert min(norms) < config.clip < max(norms)
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.detach().abs().max()), msg=name)
        assert (ours.grad == 0).all()


def test_clip_zero_is_no_clipping() -> None:
    results = []
    for clip in (0.0, 1e9):
        model = made()
        backward(model, 0, scale=100.0)
        AdamW(model, OptimConfig(clip=clip)).step(1, 1e-3)
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*results)


def test_only_matrices_are_decayed() -> None:
    model = made()
    optimizer = AdamW(model, OptimConfig(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step(1, 0.1)  # without gradients only the decay acts
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.dim() > 1 else 1.0), msg=name)


def test_bfloat16_masters_keep_updates_that_rounding_would_lose() -> None:
    model = one_linear(1.0, torch.bfloat16)
    optimizer = AdamW(model, OptimConfig(weight_decay=0.0, clip=0.0))
    assert torch.tensor(1.0 - 1e-4).bfloat16() == 1  # one step alone vanishes
    for step in range(1, 201):
        for parameter in model.parameters():
            parameter.grad.fill_(1.0)
        optimizer.collect()
        optimizer.step(step, 1e-4)
    for _, part, master in (entry for entry in optimizer.tensors() if entry[0] == "weight"):
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, torch.full(part.shape, 0.98), rtol=0, atol=1e-5)
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert (parameter == torch.tensor(0.98).bfloat16()).all()


def test_bfloat16_gradients_add_up_in_float32() -> None:
    model = one_linear(1.0, torch.bfloat16)
    optimizer = AdamW(model, OptimConfig())
    for _ in range(300):  # a bfloat16 sum of ones stops at 256
        for parameter in model.parameters():
            parameter.grad += 1.0
        optimizer.collect()
    for bucket in optimizer.buckets:
        assert (bucket.gradient == 300).all()
        assert (bucket.backward == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, value: float) -> None:
    model = made(dtype)
    optimizer = AdamW(model, OptimConfig())
    backward(model, 1)
    optimizer.collect()
    optimizer.step(1, 1e-3)
    before = [(kind, part.name, view.clone()) for kind, part, view in optimizer.tensors()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, 2)
    model.blocks["0"].attention.qkv.weight.grad[3, 5] = value
    optimizer.collect()
    assert not math.isfinite(optimizer.step(2, 1e-3))
    for (kind, name, then), (_, _, now) in zip(before, optimizer.tensors(), strict=True):
        assert torch.equal(then, now), (kind, name)
    assert all(torch.equal(then, now) for then, now in zip(weights, model.parameters(), strict=True))
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    backward(model, 3)
    optimizer.collect()
    assert 0 < optimizer.step(2, 1e-3) < math.inf
    assert not all(torch.equal(then, now) for then, now in zip(weights, model.parameters(), strict=True))


def test_tensors_hold_every_part_three_times_and_loading_them_restores_the_run() -> None:
    model, config = made(torch.bfloat16), OptimConfig()
    optimizer = AdamW(model, config)
    for step in (1, 2):
        backward(model, step)
        optimizer.collect()
        optimizer.step(step, 1e-2)
    kinds = [(kind, part.name) for kind, part, _ in optimizer.tensors()]
    assert len(set(kinds)) == len(kinds) == 3 * len(optimizer.parts)
    twin = made(torch.bfloat16)
    restored = AdamW(twin, config)
    for (_, _, target), (_, _, source) in zip(restored.tensors(), optimizer.tensors(), strict=True):
        target.copy_(source)
    restored.publish()
    for one, other in ((model, optimizer), (twin, restored)):
        backward(one, 3)
        other.collect()
        other.step(3, 1e-2)
    for (name, expected), found in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(expected, found), name
