"""Products in float8: emulation follows the definition, edges included, and says nothing to what shares a scale but in its last digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from teratron.config import ModelConfig, UserError
from teratron.models import build_model, initialise
from teratron.models.float8 import E4M3, E5M2, Float8, on_device, rounded, scaled_product, use_float8
from teratron.models.leaves import Linear
from teratron.models.products import EXACT


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal numbers whose rows differ in size."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw) * torch.exp(torch.randn(shape[0], 1, generator=draw))).to(dtype)


def nearest(value: float, mantissa: int, least: int, largest: float) -> float:
    """A number rounded to so many bits behind the point, ties to even, with subnormals below 2^least."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, least) - mantissa)
    return math.copysign(min(round(abs(value) / step) * step, largest), value)


@pytest.mark.parametrize(("dtype", "mantissa", "least"), [(E4M3, 3, -6), (E5M2, 2, -14)])
@pytest.mark.parametrize("rows", [False, True])
def test_numbers_are_the_nearest_of_the_type_after_an_exact_scale(dtype: torch.dtype, mantissa: int, least: int, rows: bool) -> None:
    x = drawn(6, 40) * 2.0 ** torch.arange(-39, 1)  # the small ones are subnormal beside the large
    found, scale = rounded(x, dtype, rows)
    assert scale.shape == ((6, 1) if rows else ())
    assert (torch.frexp(scale).mantissa == 0.5).all()
    largest = torch.finfo(dtype).max
    expected = [[nearest(v, mantissa, least, largest) for v in row] for row in (x.double() / scale.double()).tolist()]
    assert found.double().tolist() == expected
    top = (x.float() / scale).abs().amax(-1) if rows else (x.float() / scale).abs().max()
    assert (top <= largest).all()
    assert (top > largest / 4).all()


@pytest.mark.parametrize("rows", [False, True])
def test_a_product_is_that_of_the_decoded_numbers(rows: bool) -> None:
    a, b = drawn(16, 48), drawn(32, 48, seed=1)
    (a8, a_scale), (b8, b_scale) = rounded(a, E4M3, rows), rounded(b, E4M3, rows)
    decoded = (a8.double() * a_scale) @ (b8.double() * b_scale).t()
    bound = (a8.double() * a_scale).abs() @ (b8.double() * b_scale).abs().t()
    exact = scaled_product(a.double(), b.double(), E4M3, rows)
    assert torch.allclose(exact, decoded, rtol=1e-12, atol=0)
    assert ((scaled_product(a.float(), b.float(), E4M3, rows) - decoded).abs() <= 48 * 2.0**-24 * bound).all()
    assert torch.equal(scaled_product(a, b, E4M3, rows), scaled_product(a.float(), b.float(), E4M3, rows).bfloat16())
    assert 0.001 < float((exact - a.double() @ b.double().t()).norm() / exact.norm()) < 0.06


@pytest.mark.parametrize("a_type", [E4M3, E5M2])
def test_it_agrees_with_pytorchs_own_scaled_product(a_type: torch.dtype) -> None:
    a, b = drawn(16, 48), drawn(32, 48, seed=1)
    (a8, a_scale), (b8, b_scale) = rounded(a, a_type, False), rounded(b, E4M3, False)
    theirs = torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.float32)
    ours = scaled_product(a.float(), b.float(), a_type, False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(("a_type", "rows"), [(E4M3, False), (E5M2, False), (E4M3, True)])
def test_the_way_of_gpus_fills_up_any_sizes(a_type: torch.dtype, rows: bool) -> None:
    a, b = drawn(24, 70), drawn(50, 70, seed=1)
    exact = scaled_product(a.double(), b.double(), a_type, rows)
    found = on_device(a, b, a_type, rows)
    assert (found.shape, found.dtype) == (exact.shape, torch.bfloat16)
    assert ((found.double() - exact).abs() <= 2.0**-7 * exact.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_edges(rows: bool, dtype: torch.dtype) -> None:
    a, b = drawn(4, 16, dtype=dtype), drawn(5, 16, dtype=dtype, seed=1)
    a[1] = 0
    assert not scaled_product(a, b, E4M3, rows)[1].any()
    assert not scaled_product(torch.zeros_like(a), b, E4M3, rows).any()
    tiny = torch.full_like(a, torch.finfo(dtype).tiny)
    assert scaled_product(tiny, torch.ones_like(b), E4M3, rows).isfinite().all()
    huge = torch.full_like(a, 1e38)
    assert scaled_product(huge, b, E4M3, rows)[0, 0] != 0
    for bad in (math.nan, math.inf, -math.inf):
        a[2, 3] = bad
        spoilt = scaled_product(a, b, E5M2, rows)
        assert spoilt[2].isnan().all()
        assert spoilt[0].isfinite().all() == rows  # what shares no scale with it is as it was


def test_what_shares_a_scale_hardly_matters() -> None:
    """A tensor's largest number decides on the scale of all, a power of two: only digits of the smallest can change."""
    a, b = drawn(8, 64, dtype=torch.float64), drawn(8, 64, dtype=torch.float64, seed=1)
    alone = scaled_product(a[:4], b, E4M3, False)
    together = scaled_product(torch.cat([a[:4], 30 * a[4:]]), b, E4M3, False)[:4]
    assert float((alone - together).abs().max() / alone.abs().max()) < 1e-4


@pytest.mark.parametrize("rows", [False, True])
def test_gradients_are_those_of_the_products(rows: bool) -> None:
    """x, W and slope of ones are exact in float8, so nothing is rounded, and gradients must be those of autograd."""
    leaf = Linear(16, 32, bias=True, std=1.0).double()
    draw = torch.Generator().manual_seed(0)
    x, slope = (torch.randint(-7, 8, (2, 3, size), generator=draw).double() for size in (16, 32))
    slope = slope.sign()
    with torch.no_grad():
        leaf.weight.copy_(torch.randint(-7, 8, (32, 16), generator=draw))
        assert leaf.bias is not None
        leaf.bias.copy_(torch.randn(32, generator=draw))
    found = []
    for products in (EXACT, Float8(rows)):
        leaf.products = products
        leaf.zero_grad()
        inputs = x.clone().requires_grad_()
        y = leaf(inputs)
        y.backward(slope)
        found.append([y.detach(), inputs.grad, leaf.weight.grad, leaf.bias.grad])
    for exact, ours in zip(*found, strict=True):
        assert exact is not None
        assert torch.equal(exact, ours)


def test_exceptions_keep_the_exact_products() -> None:
    model = build_model(ModelConfig(layers=3, hidden=16, heads=2, seq_length=8, vocab_size=16, experts=2, shared_experts=1), device="meta")
    initialise(model.to_empty(device="cpu"), 1)
    use_float8([model], "row", ["first", "last", "*.attention.output"], torch.device("cpu"))
    rough = {path for path, leaf in model.named_modules() if isinstance(leaf, Linear) and leaf.products is not EXACT}
    assert rough == {"blocks.1.attention.qkv", "blocks.1.ffn.shared.up", "blocks.1.ffn.shared.down"}
    with pytest.raises(UserError, match=r"nothing.*matches no linear layer"):
        use_float8([model], "row", ["nothing"], torch.device("cpu"))
