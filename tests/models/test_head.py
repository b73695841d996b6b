"""The fused head: its loss and gradients are those of a plain cross-entropy, label smoothing included; padding takes no part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.models import head
from teratron.models.head import LanguageHead
from teratron.models.products import emulated

TOKENS, WIDTH, VOCAB, PADDED = 50, 12, 37, 48


def example(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[LanguageHead, Tensor, Tensor, Tensor]:
    """A head (with large numbers in its padding), hidden [1, T, H], targets, uneven weights of which some are zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    weight[VOCAB:] *= 50
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) * (torch.arange(tokens) % 3 > 0)
    module = LanguageHead(WIDTH, VOCAB, 16, 0.02).to(dtype)
    module.weight.data.copy_(weight)
    return module, hidden[None].to(dtype).requires_grad_(), targets[None], weights[None]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = (hidden @ weight.t()).flatten(0, 1)[:, :VOCAB]
    return (F.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=smoothing) * weights.flatten()).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("rows", [1, 16, 17, 49, 50, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy_for_any_chunk(rows: int, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", rows * PADDED)
    monkeypatch.setattr(head, "CHUNK_ROWS", 1)
    module, hidden, targets, weights = example()
    loss = module.loss_sum(hidden, targets, weights, smoothing)
    expected = plain(hidden, module.weight, targets, weights, smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    upstream = torch.tensor(0.7, dtype=torch.float64)
    found = torch.autograd.grad(loss, (hidden, module.weight), upstream)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, module.weight), upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13 * float(theirs.abs().max()))
    assert (found[1][VOCAB:] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_are_the_slopes_of_the_loss(smoothing: float) -> None:
    """Central differences along every fifth coordinate (`gradcheck` runs a graph's backward twice, which this one refuses)."""
    module, hidden, targets, weights = example(tokens=4)
    gradients = torch.autograd.grad(module.loss_sum(hidden, targets, weights, smoothing), (hidden, module.weight))
    with torch.no_grad():
        for tensor, gradient in zip((hidden, module.weight), gradients, strict=True):
            for flat in range(0, tensor.numel(), 5):
                values = []
                for change in (1e-6, -2e-6, 1e-6):
                    tensor.view(-1)[flat] += change
                    values.append(float(module.loss_sum(hidden, targets, weights, smoothing)))
                assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient.view(-1)[flat]), abs=2e-8)


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    module, hidden, targets, weights = example()
    loss = module.loss_sum(hidden, targets, weights) * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_has_no_probability_and_no_gradient(smoothing: float) -> None:
    module, hidden, targets, weights = example()
    assert module(hidden).shape == (1, TOKENS, VOCAB)
    loss = module.loss_sum(hidden, targets, weights, smoothing)
    loss.backward()
    assert module.weight.grad is not None
    assert (module.weight.grad[VOCAB:] == 0).all()
    module.weight.data[VOCAB:] = -1e3
    assert torch.equal(module.loss_sum(hidden, targets, weights, smoothing), loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_softmax_of_half_types_is_float32(dtype: torch.dtype, smoothing: float) -> None:
    module, hidden, targets, weights = example(dtype)
    loss = module.loss_sum(hidden, targets, weights, smoothing)
    assert loss.dtype == torch.float32
    wide = [tensor.float() if emulated(tensor) else tensor for tensor in (hidden, module.weight)]  # logits are then never rounded
    exact = plain((wide[0] @ wide[1].t()).double(), torch.eye(PADDED, dtype=torch.float64), targets, weights, smoothing)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert [grad.dtype for grad in torch.autograd.grad(loss, (hidden, module.weight))] == [dtype, dtype]


def test_a_loss_scale_beyond_float16_reaches_the_weights_gradient() -> None:
    module, hidden, targets, _ = example(torch.float16)
    weights, scale = torch.full(targets.shape, 1e-3), 2.0**17
    assert torch.tensor(scale).half().isinf()
    exact, wide, *_ = example()
    (expected,) = torch.autograd.grad(plain(wide, exact.weight, targets, weights.double()), exact.weight)
    (found,) = torch.autograd.grad(module.loss_sum(hidden, targets, weights) * scale, module.weight)
    torch.testing.assert_close(found.double() / scale, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden, targets, weights = example()
    hidden = hidden.detach()
    expected = module.loss_sum(hidden, targets, weights)
    monkeypatch.setattr(head, "_add_product", None)  # the product that only gradients need
    with torch.no_grad():
        assert torch.equal(module.loss_sum(hidden, targets, weights), expected)
    with pytest.raises(TypeError):
        module.loss_sum(hidden, targets, weights)
