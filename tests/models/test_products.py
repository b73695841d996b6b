"""Products of half types in float32: as near to the exact ones as rounding once allows, in every gradient, whole or piece by piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import Config
from teratron.models import products
from teratron.models.head import LanguageHead
from teratron.models.leaves import Linear
from teratron.models.products import EXACT, linear
from teratron.models.widened import widened_attention
from teratron.parallel.mesh import Mesh
from teratron.train.engine import Engine

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has none for half types."""
    monkeypatch.setattr(products, "multiplied_natively", lambda dtype: False)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_rounded(found: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    """Off by half a unit in the last place for each rounding, and by what float32 sums lose."""
    assert found.dtype in HALVES
    allowed = roundings * torch.finfo(found.dtype).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 3, 40])
@pytest.mark.parametrize("at_once", [1, 3 * 24, 2**20])
def test_linear_is_the_exact_product_rounded_once(dtype: torch.dtype, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CONVERTED", at_once)
    x, weight, bias = numbers(rows, 1, 24, dtype=dtype), numbers(10, 24, dtype=dtype, seed=1), numbers(10, dtype=dtype, seed=2)
    for b in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        found = linear(x, weight, b)
        assert found.shape == exact.shape
        # few rows of bfloat16 are multiplied as they are, and the bias is then added to what has been rounded
        assert_rounded(found, exact, 1.0 if rows > products.FEW_ROWS or dtype == torch.float16 or b is None else 4.0)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_a_linear_leaf_are_the_exact_ones_rounded_once(dtype: torch.dtype) -> None:
    leaf = Linear(24, {"a": 6, "b": 4}, True, 0.02)
    leaf.weight.data, x = numbers(10, 24, dtype=torch.float64), numbers(3, 5, 24, dtype=torch.float64, seed=1)
    leaf.bias.data = numbers(10, dtype=torch.float64, seed=2)  # type: ignore[union-attr]
    leaf.to(dtype)
    slope, x = numbers(3, 5, 10, dtype=dtype, seed=3), x.to(dtype).requires_grad_()
    leaf(x).backward(slope)
    rows = slope.double().flatten(0, 1)
    assert_rounded(x.grad, slope.double() @ leaf.weight.double())  # type: ignore[arg-type]
    assert_rounded(leaf.weight.grad, rows.t() @ x.double().flatten(0, 1))  # type: ignore[arg-type]
    assert_rounded(leaf.bias.grad, rows.sum(0))  # type: ignore[arg-type,union-attr]
    there = numbers(10, 24, dtype=dtype, seed=4)
    total = there.clone()
    EXACT.add_to_weight(total, slope, x.detach())
    assert_rounded(total, there.double() + rows.t() @ x.double().flatten(0, 1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sees", ["all", "earlier", "boolean", "added"])
def test_attention_and_its_gradients_are_the_exact_ones_within_rounding(dtype: torch.dtype, sees: str) -> None:
    inputs = [numbers(2, heads, 9, 8, dtype=dtype, seed=heads + n).requires_grad_() for n, heads in enumerate((4, 2, 2))]
    mask: Tensor | None = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(2) if sees == "boolean" else None
    mask = numbers(1, 4, 9, 9, dtype=dtype) if sees == "added" else mask
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = widened_attention(*inputs, mask, sees == "earlier")
    bias = mask.double() if sees == "added" and mask is not None else mask
    right = F.scaled_dot_product_attention(*exact, attn_mask=bias, is_causal=sees == "earlier", enable_gqa=True)
    assert_rounded(found, right, 1.1)
    slope = numbers(2, 4, 9, 8, dtype=dtype, seed=9)
    found.backward(slope)
    right.backward(slope.double())
    for half, double in zip(inputs, exact, strict=True):  # what is kept of the output has been rounded: backward is off by more
        torch.testing.assert_close(half.grad.double(), double.grad, rtol=0.02, atol=0.02)  # type: ignore[union-attr]


def test_attention_with_a_learnt_bias_gives_it_a_gradient() -> None:
    """Which the fused kernel does not."""
    q, k, v = (numbers(1, 2, 5, 8, dtype=torch.bfloat16, seed=n).requires_grad_() for n in range(3))
    bias = numbers(1, 2, 5, 5, dtype=torch.bfloat16, seed=3).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, bias)]
    widened_attention(q, k, v, bias, False).square().sum().backward()
    F.scaled_dot_product_attention(*exact[:3], attn_mask=exact[3]).square().sum().backward()
    for half, double in zip((q, k, v, bias), exact, strict=True):
        torch.testing.assert_close(half.grad.double(), double.grad, rtol=0.05, atol=0.05)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_and_gradients_of_the_head_are_the_exact_ones_rounded_once(dtype: torch.dtype) -> None:
    module = LanguageHead(12, 37, 16, 0.02, bias=True)
    module.weight.data, hidden = numbers(48, 12, dtype=torch.float64), numbers(1, 50, 12, dtype=torch.float64, seed=1)
    module.bias.data = numbers(48, dtype=torch.float64, seed=2)  # type: ignore[union-attr]
    module, hidden = module.to(dtype), hidden.to(dtype).requires_grad_()
    targets, weights = torch.arange(50)[None] % 37, torch.arange(50)[None] % 3 / 2
    loss = module.loss_sum(hidden, targets, weights)
    loss.backward()
    twin, exact = module.double(), hidden.detach().double().requires_grad_()
    found = [hidden.grad, module.weight.grad, module.bias.grad]  # type: ignore[union-attr]
    found = [x.to(dtype) for x in found if x is not None]
    twin.zero_grad()
    right = twin.loss_sum(exact, targets, weights.double())
    right.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    for half, double in zip(found, (exact.grad, twin.weight.grad, twin.bias.grad), strict=True):  # type: ignore[union-attr]
        assert_rounded(half, double)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gpt", "moe", "adapters"])
def test_a_step_agrees_with_one_of_pytorchs_own_half_products(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, object] = {"model.layers": 1, "model.hidden": 16, "model.heads": 2, "model.seq_length": 8, "model.vocab_size": 20}
    keys |= {"train.precision": "bf16", "train.global_batch": 2}
    keys |= {"moe": {"model.experts": 4, "model.experts_per_token": 2}, "adapters": {"model.adapter_rank": 2}}.get(family, {})
    batch = {"tokens": torch.arange(16).view(2, 8), "positions": torch.arange(8).expand(2, 8), "sample": torch.arange(2)}
    batch |= {"targets": batch["tokens"] + 1, "weights": torch.ones(2, 8)}
    found = []
    for native in (False, True):
        monkeypatch.setattr(products, "multiplied_natively", lambda dtype, native=native: native)
        engine = Engine(Config().override(keys), Mesh())
        engine.optimizer.initialise(1)
        tally, norm = engine.step(batch, step=1, number=1, lr=0.1)
        found.append((float(tally.loss()), float(norm)))
    assert found[0] == pytest.approx(found[1], rel=0.01)
