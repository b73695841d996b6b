"""Dense attention of half types where products of these are only emulated: PyTorch's fused CPU kernel in float32.

Its backward pass in bfloat16 takes six times as long there. What is kept for backward stays in the half type. Shape letters: `leaves.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def widened_attention(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, [B, N, S, D]; mask broadcasts to [B, N, S, T], boolean or what is added."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q_BNSD.dtype).masked_fill_(~mask, -math.inf)
    return _run(q_BNSD, k_BKTD, v_BKTD, mask, causal)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is None or not mask.requires_grad:
        made: Tensor = _Widened.apply(q, k, v, mask, causal)
        return made
    wide = _widened(q, k, v)  # the kernel has no gradient for masks
    return F.scaled_dot_product_attention(*wide, attn_mask=mask.float(), is_causal=causal).to(q.dtype)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        bias, attend = None if mask is None else mask.float(), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = attend(*_widened(q, k, v), 0.0, causal, attn_mask=bias)
        made: Tensor = out.to(q.dtype)
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, mask, made, log_sum)
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, made, log_sum = ctx.saved_tensors
        bias, attend = None if mask is None else mask.float(), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        kept = *_widened(q, k, v), made.float(), log_sum
        slopes = attend(upstream[0].float().contiguous(), *kept, 0.0, ctx.causal, attn_mask=bias)
        of_q, of_k, of_v = (slope.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype) for slope, x in zip(slopes, (q, k, v), strict=True))
        return of_q, of_k, of_v, None, None


def _widened(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32, keys and values as often as heads share them."""
    share = q_BNSD.shape[1] // k_BKTD.shape[1]
    # Contiguous, as the kernel takes features to lie side by side.
    q, k, v = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (q_BNSD, k_BKTD, v_BKTD))
    return (q, k, v) if share == 1 else (q, k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1))
