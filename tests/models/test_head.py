"""The fused head: its loss and gradients are those of a plain cross-entropy; padding takes no part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.models import head
from teratron.models.head import LanguageHead, LinearCrossEntropy

TOKENS, WIDTH, VOCAB, PADDED = 50, 12, 37, 48


def example(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight (with large numbers in its padding), targets, uneven weights of which some are zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    weight[VOCAB:] *= 50
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) * (torch.arange(tokens) % 3 > 0)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, weights


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy((hidden @ weight.t())[:, :VOCAB], targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("rows", [1, 16, 17, 49, 50, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy_for_any_chunk(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", rows * PADDED)
    monkeypatch.setattr(head, "CHUNK_ROWS", 1)
    hidden, weight, targets, weights = example()
    loss = LinearCrossEntropy.apply(hidden, weight, targets, weights, VOCAB)
    expected = plain(hidden, weight, targets, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    upstream = torch.tensor(0.7, dtype=torch.float64)
    found = torch.autograd.grad(loss, (hidden, weight), upstream)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13 * float(theirs.abs().max()))
    assert (found[1][VOCAB:] == 0).all()


def test_gradients_are_the_slopes_of_the_loss() -> None:
    """Central differences along every fifth coordinate (`gradcheck` runs a graph's backward twice, which this one refuses)."""
    hidden, weight, targets, weights = example(tokens=4)
    gradients = torch.autograd.grad(LinearCrossEntropy.apply(hidden, weight, targets, weights, VOCAB), (hidden, weight))
    with torch.no_grad():
        for tensor, gradient in zip((hidden, weight), gradients, strict=True):
            for flat in range(0, tensor.numel(), 5):
                values = []
                for change in (1e-6, -2e-6, 1e-6):
                    tensor.view(-1)[flat] += change
                    values.append(float(LinearCrossEntropy.apply(hidden, weight, targets, weights, VOCAB)))
                assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient.view(-1)[flat]), abs=2e-8)


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    hidden, weight, targets, weights = example()
    loss = LinearCrossEntropy.apply(hidden, weight, targets, weights, VOCAB) * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_padding_has_no_probability_and_no_gradient() -> None:
    module = LanguageHead(WIDTH, VOCAB, 16, 0.02).double()
    hidden, weight, targets, weights = example()
    module.weight.data.copy_(weight.data)
    assert module(hidden).shape == (TOKENS, VOCAB)
    loss = module.loss_sum(hidden[None], targets[None], weights[None])
    loss.backward()
    assert module.weight.grad is not None
    assert (module.weight.grad[VOCAB:] == 0).all()
    module.weight.data[VOCAB:] = -1e3
    assert torch.equal(module.loss_sum(hidden[None], targets[None], weights[None]), loss)


def test_bfloat16_softmax_is_float32() -> None:
    hidden, weight, targets, weights = example(torch.bfloat16)
    loss = LinearCrossEntropy.apply(hidden, weight, targets, weights, VOCAB)
    assert loss.dtype == torch.float32
    exact = plain((hidden @ weight.t()).double(), torch.eye(PADDED, dtype=torch.float64), targets, weights)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert [grad.dtype for grad in torch.autograd.grad(loss, (hidden, weight))] == [torch.bfloat16, torch.bfloat16]


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LanguageHead(WIDTH, VOCAB, 16, 0.02).double()
    hidden, weight, targets, weights = example()
    hidden = hidden.detach()
    module.weight.data.copy_(weight.data)
    expected = module.loss_sum(hidden[None], targets[None], weights[None])
    monkeypatch.setattr(head, "_add_product", None)  # the product that only gradients need
    with torch.no_grad():
        assert torch.equal(module.loss_sum(hidden[None], targets[None], weights[None]), expected)
    with pytest.raises(TypeError):
        module.loss_sum(hidden[None], targets[None], weights[None])
