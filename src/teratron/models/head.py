"""The language-model head: output projection and cross-entropy fused in chunks, so that full logits never exist in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teratron.models.blockwise import capped
from teratron.models.leaves import Leaf, Part, accurate
from teratron.models.products import emulated, linear

CHUNK_LOGITS = 2**22
"""Logits of one chunk (rows times vocabulary): 16 MiB in float32."""
CHUNK_ROWS = 512
"""Least rows of a chunk: with fewer the products, and the passes over the weight's gradient, grow slow."""


@dataclass(frozen=True)
class Vocabulary:
    """Which rows of the vocabulary a weight holds, and how numbers are joined with those who hold the others."""

    total: int
    first: int
    count: int
    """Rows that are held here, [first, first + count); the weight's further rows are padding."""
    add: Callable[[Tensor], None] | None = None
    """Sum over all holders, in place; None = there is one."""
    maximum: Callable[[Tensor], None] | None = None


class LanguageHead(Leaf):
    """Scores of a token, or of another class. Rows of padding in the weight are masked out of every softmax.

    With `shared` the head uses that parameter (the token embedding's), which keeps its one name and owner. `name` is the
    part's name; a head apart from the embedding that it is tied to holds a copy under the embedding's name (contract C9).
    """

    def __init__(
        self,
        width: int,
        vocab: int,
        multiple: int,
        std: float,
        shared: nn.Parameter | None = None,
        name: str = ".weight",
        bias: bool = False,
        cap: float = 0.0,
    ) -> None:
        """cap: the bound of logits, which become cap * tanh(logit / cap); 0 = none."""
        super().__init__()
        self.multiple, self.std, self.name, self.owns, self.cap = multiple, std, name, shared is None, cap
        self.vocabulary = Vocabulary(vocab, 0, vocab)
        self.weight = nn.Parameter(torch.empty(-(-vocab // multiple) * multiple, width)) if shared is None else shared
        self.bias = nn.Parameter(torch.empty(self.weight.shape[0])) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., H], padding cut off."""
        return capped(linear(hidden, self.weight, self.bias)[..., : self.vocabulary.count], self.cap)

    def loss_sum(self, hidden: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0, most: int = 0) -> Tensor:
        """Sum over tokens of weight * cross-entropy; hidden [B, S, H], targets and weights [B, S]. A scalar.

        smoothing: the share of each target's probability that is spread evenly over the whole vocabulary. most: no row has more
        tokens of any weight, and no others are looked at; 0 = all may have.
        """
        if 0 < most < weights.shape[1]:
            places = (weights != 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            targets, weights = targets.gather(1, places), weights.gather(1, places)
        # Inside an autograd function a parameter asks for its gradient even under no_grad; evaluation must not pay for it.
        learning = torch.is_grad_enabled()
        weight, bias = (tensor if learning or tensor is None else tensor.detach() for tensor in (self.weight, self.bias))
        flat = hidden.flatten(0, -2), weight, bias, targets.flatten(), weights.flatten()
        return LinearCrossEntropy.apply(*flat, self.vocabulary, smoothing, self.cap)

    def leaf_parts(self) -> Iterator[Part]:
        if self.owns:
            yield Part(self.name, "weight", 0, (self.vocabulary.total, self.weight.shape[1]), self.std)
        if self.bias is not None:
            yield Part(".bias", "bias", 0, (self.vocabulary.total,), None)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted token losses; gradients are made in the forward pass, chunk by chunk, while the logits are at hand.

    The upstream gradient of a sum is one number, so backward only scales: it runs once. Softmax in float32 for half types,
    and so is the weight's gradient kept until it has been scaled. With a vocabulary that is cut over ranks, the gradient of
    hidden is this rank's share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        weights_T: Tensor,
        vocabulary: Vocabulary,
        smoothing: float,
        cap: float,
    ) -> Tensor:
        ctx.dtype = hidden_TH.dtype
        if emulated(hidden_TH):  # from here on as float32, rounded at the end
            hidden_TH, weight_VH = hidden_TH.float(), weight_VH.float()
        needs_gradient, needs_weight = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[1]
        exact = accurate(hidden_TH.dtype)
        half = exact != hidden_TH.dtype
        total = torch.zeros((), dtype=exact, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if needs_gradient else None
        grad_weight: Tensor | None = None
        grad_bias = bias_V.new_zeros(bias_V.shape, dtype=exact) if bias_V is not None and ctx.needs_input_grad[2] else None
        rows = min(max(CHUNK_LOGITS // weight_VH.shape[0], CHUNK_ROWS), hidden_TH.shape[0])
        products = hidden_TH.new_empty(rows, weight_VH.shape[0])  # one buffer for all chunks: fresh ones cost page faults
        accurates = products.to(exact)
        for start in range(0, hidden_TH.shape[0], rows):
            part = slice(start, start + rows)
            hidden, weights = hidden_TH[part], weights_T[part, None].to(exact)
            product, logits = products[: len(hidden)], accurates[: len(hidden)]
            torch.mm(hidden, weight_VH.t(), out=product)
            if half:
                logits.copy_(product)
            if bias_V is not None:
                logits.add_(bias_V)
            damping = 1 - logits.div_(cap).tanh_().square() if cap else None
            total += _losses(logits.mul_(cap) if cap else logits, targets_T[part, None], weights, vocabulary, smoothing)
            if grad_hidden is not None:
                if damping is not None:
                    logits.mul_(damping)
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                slopes = product.copy_(logits) if half else logits
                torch.mm(slopes, weight_VH, out=grad_hidden[part])
                grad_weight = _add_product(grad_weight, slopes.t(), hidden) if needs_weight else None
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # In half types the factor may be a large loss scale: multiply what is kept accurately before it is rounded.
        factor, dtype = upstream[0], ctx.dtype
        of_weight, of_bias = (None if g is None else g.mul_(factor.to(g.dtype)).to(dtype) for g in (grad_weight, grad_bias))
        return grad_hidden.mul_(factor.to(accurate(dtype))).to(dtype), of_weight, of_bias, None, None, None, None, None


def _losses(logits: Tensor, targets: Tensor, weights: Tensor, vocabulary: Vocabulary, smoothing: float) -> Tensor:
    """The weighted sum of a chunk's losses; its logits [T, V] become the gradients of that sum. targets, weights [T, 1]."""
    count = vocabulary.count
    logits[:, count:] = -math.inf
    peak = logits.amax(-1, keepdim=True)
    if vocabulary.maximum is not None:
        vocabulary.maximum(peak)
    place = targets - vocabulary.first
    here = (place >= 0) & (place < count)
    place = place.clamp(0, count - 1)
    shifted = logits.sub_(peak)
    of_target = shifted.gather(-1, place) * here
    of_all = [shifted[:, :count].sum(-1, keepdim=True)] if smoothing else []
    exps = shifted.exp_()
    sums = torch.stack([exps.sum(-1, keepdim=True), of_target, *of_all])
    if vocabulary.add is not None:
        vocabulary.add(sums)
    normaliser, of_target, *of_all = sums
    losses = normaliser.log() - (1 - smoothing) * of_target
    if smoothing:
        losses = losses - smoothing / vocabulary.total * of_all[0]
    slopes = exps.mul_(weights / normaliser)
    slopes.scatter_add_(-1, place, -(1 - smoothing) * weights * here)
    if smoothing:
        slopes[:, :count] -= smoothing / vocabulary.total * weights
    return (losses * weights).sum()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place where there is a total; sums of half types are kept in float32."""
    if accurate(a.dtype) == a.dtype:
        return a @ b if total is None else total.addmm_(a, b)
    product = (a @ b).to(accurate(a.dtype))
    return product if total is None else total.add_(product)
