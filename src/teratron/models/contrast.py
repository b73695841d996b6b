"""How alike the final hidden states of one sequence are, as a loss: all pairs of tokens beyond a margin (Su et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.leaves import accurate

CHUNK_PAIRS = 2**22
"""Pairs whose similarities exist at a time: 16 MiB in float32."""


class TokenContrast(nn.Module):
    """The contrastive term of SimCTG, a sum over ordered pairs of different tokens of one document. Has no parameters."""

    place = 0
    """Which share of the sequences is here."""

    def forward(self, hidden_BSH: Tensor, weights_BS: Tensor, segments_BS: Tensor | None, margin: float) -> Tensor:
        """The sum of w_i w_j max(0, margin - 1 + cosine(h_i, h_j)). A scalar, in float32 for half types.

        weights: of tokens; a pair weighs their product. segments: documents; None = one a sequence.
        """
        exact = accurate(hidden_BSH.dtype)
        unit_BSH = F.normalize(hidden_BSH.to(exact), dim=-1)
        return _PairHinge.apply(unit_BSH, weights_BS.to(exact), segments_BS, self, margin)

    def every(self, x_BS: Tensor) -> Tensor:
        """All tokens of the sequences, from those that are here: here these are all."""
        return x_BS

    def total(self, x: Tensor) -> Tensor:
        """The sum over those who have other tokens but tell the same loss: here there is one."""
        return x


class _PairHinge(torch.autograd.Function):
    """The tokens that are here against all; the gradient is made in the forward pass, chunk by chunk, as only a factor is missing.

    A pair and its mirror image are alike, so a token's whole gradient is twice that of the pairs in which it comes first:
    nobody has to be told of the others.
    """

    @staticmethod
    def forward(ctx: Any, unit_BSH: Tensor, weights_BS: Tensor, segments_BS: Tensor | None, leaf: TokenContrast, margin: float) -> Tensor:
        (batch, length), dtype = unit_BSH.shape[:2], unit_BSH.dtype
        every_BTH, every_weights_BT = leaf.every(unit_BSH), leaf.every(weights_BS)
        every_segments_BT = None if segments_BS is None else leaf.every(segments_BS)
        total = torch.zeros((), dtype=dtype, device=unit_BSH.device)
        gradient = torch.empty_like(unit_BSH) if ctx.needs_input_grad[0] else None
        rows = max(CHUNK_PAIRS // (batch * every_BTH.shape[1]), 1)
        for start in range(0, length, rows):
            part = slice(start, start + rows)
            pairs = weights_BS[:, part, None] * every_weights_BT[:, None]
            pairs.diagonal(leaf.place * length + start, 1, 2).zero_()
            if segments_BS is not None and every_segments_BT is not None:
                pairs *= segments_BS[:, part, None] == every_segments_BT[:, None]
            excess = (unit_BSH[:, part] @ every_BTH.mT).add_(margin - 1).clamp_(min=0)
            total += (excess * pairs).sum()
            if gradient is not None:
                gradient[:, part] = 2 * (excess.sign_().mul_(pairs) @ every_BTH)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return leaf.total(total)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.saved_tensors[0] * upstream[0], None, None, None, None
