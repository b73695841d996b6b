"""The contrastive term: SimCTG's formula, pairs within documents only, the same however the batch is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.models import contrast
from teratron.models.contrast import TokenContrast
from teratron.objectives.contrastive import pair_count

MARGIN = 0.5


def states(rows: int = 3, length: int = 7) -> Tensor:
    """Hidden states of which some are alike and some are not."""
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(rows, length, 5, generator=draw, dtype=torch.float64) + 0.7).requires_grad_()


def paper(hidden_SH: Tensor, margin: float = MARGIN) -> Tensor:
    """The term of one sequence, as the paper writes it."""
    length, total = len(hidden_SH), hidden_SH.new_zeros(())
    for i in range(length):
        for j in range(length):
            if i != j:
                own, other = (F.cosine_similarity(hidden_SH[i], hidden_SH[k], dim=0) for k in (i, j))
                total = total + torch.relu(margin - own + other)
    return total / (length * (length - 1))


def mean(hidden: Tensor, weights: Tensor, segments: Tensor | None = None) -> Tensor:
    return TokenContrast()(hidden, weights, segments, MARGIN) / pair_count(weights, segments)


def assert_same(found: Tensor, expected: Tensor, hidden: Tensor) -> None:
    """Values and gradients; some pairs are beyond the margin."""
    assert expected.item() > 0.01
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(value, hidden)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 30, 2**22])
def test_full_sequences_have_the_papers_loss_and_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "CHUNK_PAIRS", chunk)
    hidden = states()
    expected = torch.stack([paper(sequence) for sequence in hidden]).mean()
    assert_same(mean(hidden, torch.ones(3, 7)), expected, hidden)


def test_documents_and_tokens_without_weight_are_left_out() -> None:
    hidden = states(1, 9)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1, -1]])
    weights = torch.tensor([[1.0, 1, 1, 1, 1, 1, 0, 0, 0]])
    first, second = paper(hidden[0, :3]), paper(hidden[0, 3:5])
    assert_same(mean(hidden, weights, segments), (first * 6 + second * 2) / 8, hidden)


def test_pairs_weigh_the_product_of_their_tokens_weights() -> None:
    hidden, weights = states(2), torch.rand(2, 7, generator=torch.Generator().manual_seed(2)).double()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]])
    unit = F.normalize(hidden, dim=-1)
    pairs = weights[:, :, None] * weights[:, None] * (segments[:, :, None] == segments[:, None]) * (1 - torch.eye(7))
    expected = (torch.relu(MARGIN - 1 + unit @ unit.mT) * pairs).sum() / pairs.sum()
    assert_same(mean(hidden, weights, segments), expected, hidden)


def test_states_that_are_far_apart_have_exactly_no_loss_and_no_gradient() -> None:
    hidden = torch.eye(5, dtype=torch.float64)[None].requires_grad_()
    found = mean(hidden, torch.ones(1, 5))
    (gradient,) = torch.autograd.grad(found, hidden)
    assert found.item() == 0
    assert not gradient.any()


def test_a_document_of_one_token_has_no_pairs() -> None:
    weights = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
    assert pair_count(weights, torch.arange(3).expand(4, 3)).item() == pytest.approx(0, abs=1e-12)
    assert pair_count(torch.ones(4, 1), None).item() == 0
