"""Flat buffers: parameters and gradients are views of them, shared parameters once, and no value changes on the way in."""

from __future__ import annotations

import pytest
import torch

from teratron.config import ModelConfig, OptimConfig
from teratron.models import GPT, build_model, initialise, parts_of
from teratron.optim import AdamW
from teratron.optim.flat import flatten, global_norm

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, seq_length=8, vocab_size=30)


def made(dtype: torch.dtype = torch.float32) -> GPT:
    model = build_model(CONFIG, dtype=dtype)
    initialise(model, 1)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_and_gradients_become_views_with_the_same_values(dtype: torch.dtype) -> None:
    model = made(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buckets = flatten(model)
    assert sum(bucket.weights.numel() for bucket in buckets) == sum(values.numel() for values in before.values())
    seen = set()
    for bucket in buckets:
        for name in bucket.places:
            parameter = model.get_parameter(name)
            assert torch.equal(parameter, before[name])
            assert parameter.data_ptr() == bucket.view(bucket.weights, name).data_ptr()
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == bucket.view(bucket.backward, name).data_ptr()
            assert bucket.decayed == (parameter.dim() > 1)
            seen.add(name)
        bucket.weights.fill_(3.0)
    assert seen == set(before)
    assert all((parameter == 3).all() for parameter in model.parameters())


def test_backward_adds_into_the_buffer_and_the_norm_is_that_of_all_gradients() -> None:
    model = made(torch.float64)
    buckets = flatten(model)
    state = {"tokens": torch.arange(8)[None], "positions": torch.arange(8)[None]}
    norms = []
    for _ in range(2):
        model(state)["hidden"].sin().sum().backward()
        for bucket in buckets:
            for name in bucket.places:
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                assert gradient.data_ptr() == bucket.view(bucket.gradient, name).data_ptr()
        norms.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm())
        torch.testing.assert_close(global_norm(buckets), norms[-1], rtol=1e-14, atol=0)
    torch.testing.assert_close(norms[1], 2 * norms[0], rtol=1e-14, atol=0)
    for bucket in buckets:
        bucket.clear()
    assert global_norm(buckets) == 0


def test_tied_embeddings_stay_one_parameter_with_one_place() -> None:
    model = made()
    buckets = flatten(model)
    assert model.embedding is not None
    assert model.head is not None
    assert model.head.output.weight is model.embedding.tokens.weight
    assert "head.output.weight" not in {name for bucket in buckets for name in bucket.places}
    (bucket,) = (bucket for bucket in buckets if "embedding.tokens.weight" in bucket.places)
    view = bucket.view(bucket.weights, "embedding.tokens.weight")
    view[5] += 1.0
    assert torch.equal(model.head.output.weight[5], view[5])
    model.head.output(torch.ones(1, CONFIG.hidden)).sum().backward()
    assert (bucket.view(bucket.gradient, "embedding.tokens.weight")[: CONFIG.vocab_size] == 1).all()


def test_the_norm_of_a_large_buffer_is_exact() -> None:
    """One float32 sum over 2^25 squares would be off by a thousandth, and by how much would depend on the cut."""
    (bucket,) = flatten(torch.nn.Linear(2**25 // 4 + 7, 4, bias=False))
    bucket.gradient.normal_(generator=torch.Generator().manual_seed(0))
    expected = bucket.gradient.double().norm()
    assert abs(float(global_norm([bucket]) / expected) - 1) < 1e-8


def test_dtypes_are_kept_apart_and_frozen_parameters_out() -> None:
    model = made()
    assert model.head is not None
    model.head.norm.double()
    model.blocks["0"].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW(model, OptimConfig(weight_decay=0.5))
    assert model.head.norm.weight.dtype == torch.float64
    for bucket in optimizer.buckets:
        bucket.gradient.fill_(1.0)
    optimizer.step(1, 0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("blocks.0.")
    saved = {part.name for kind, part, _ in optimizer.tensors() if kind == "weight"}
    assert saved == {part.name for part in parts_of(model)}
