"""The language-model head: output projection and cross-entropy fused in chunks, so that full logits never exist in training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.leaves import Part, accurate

CHUNK_LOGITS = 2**22
"""Logits of one chunk (rows times vocabulary): 16 MiB in float32."""
CHUNK_ROWS = 256
"""Least rows of a chunk: with fewer the products, and the passes over the weight's gradient, grow slow."""


class LanguageHead(nn.Module):
    """Scores of the next token. Rows of padding in the weight are masked out of every softmax.

    With `shared` the head uses that parameter (the token embedding's), which keeps its one name and owner. `name` is the
    part's name; a head apart from the embedding that it is tied to holds a copy under the embedding's name (contract C9).
    """

    def __init__(
        self, width: int, vocab: int, multiple: int, std: float, shared: nn.Parameter | None = None, name: str = ".weight"
    ) -> None:
        super().__init__()
        self.vocab, self.std, self.name, self.owns = vocab, std, name, shared is None
        self.weight = nn.Parameter(torch.empty(-(-vocab // multiple) * multiple, width)) if shared is None else shared

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., H], padding cut off."""
        return F.linear(hidden, self.weight)[..., : self.vocab]

    def loss_sum(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum over tokens of weight * cross-entropy; hidden [B, S, H], targets and weights [B, S]. A scalar."""
        # Inside an autograd function a parameter asks for its gradient even under no_grad; evaluation must not pay for it.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), weights.flatten(), self.vocab)

    def leaf_parts(self) -> Iterator[Part]:
        if self.owns:
            yield Part(self.name, "weight", 0, (self.vocab, self.weight.shape[1]), self.std)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted token losses; gradients are made in the forward pass, chunk by chunk, while the logits are at hand.

    The upstream gradient of a sum is one number, so backward only scales, in place: it runs once. Softmax in float32 for
    half types.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, weights_T: Tensor, vocab: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        exact = accurate(hidden_TH.dtype)
        half = exact != hidden_TH.dtype
        total = torch.zeros((), dtype=exact, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if needs_gradient else None
        grad_weight: Tensor | None = None
        rows = min(max(CHUNK_LOGITS // weight_VH.shape[0], CHUNK_ROWS), hidden_TH.shape[0])
        products = hidden_TH.new_empty(rows, weight_VH.shape[0])  # one buffer for all chunks: fresh ones cost page faults
        accurates = products.to(exact)
        for start in range(0, hidden_TH.shape[0], rows):
            part = slice(start, start + rows)
            hidden, targets, weights = hidden_TH[part], targets_T[part, None], weights_T[part].to(exact)
            product, logits = products[: len(hidden)], accurates[: len(hidden)]
            torch.mm(hidden, weight_VH.t(), out=product)
            if half:
                logits.copy_(product)
            logits[:, vocab:] = -math.inf
            peak = logits.amax(-1, keepdim=True)
            target_logits = logits.gather(-1, targets) - peak
            exps = logits.sub_(peak).exp_()
            sums = exps.sum(-1, keepdim=True)
            total += ((sums.log() - target_logits).squeeze(-1) * weights).sum()
            if grad_hidden is not None:
                slopes = exps.mul_(weights[:, None] / sums)
                slopes.scatter_add_(-1, targets, -weights[:, None])
                slopes = product.copy_(slopes) if half else slopes
                torch.mm(slopes, weight_VH, out=grad_hidden[part])
                grad_weight = _add_product(grad_weight, slopes.t(), hidden)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = upstream[0].to(grad_hidden.dtype)
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place where there is a total; sums of half types are kept in float32."""
    if total is None:
        return a @ b
    if accurate(a.dtype) == a.dtype:
        return total.addmm_(a, b)
    return total.to(accurate(a.dtype)).add_(a @ b)
