"""Sparse attention on GPUs: PyTorch's FlexAttention (Dong et al. 2024), compiled, which passes over the blocks of keys that nobody sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teratron.models.sight import Sight

LEAST_FEATURES = 16
"""Features of a head that its kernels need."""


def fits(q_BNSD: Tensor) -> bool:
    """Whether there is a kernel for such queries."""
    return q_BNSD.is_cuda and q_BNSD.dtype != torch.float64 and q_BNSD.shape[-1] >= LEAST_FEATURES


def flexible(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, compiled: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of what a sight without places of its own lets see, with grouped key/value heads."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = _compiled() if compiled else flex_attention
    grouped = q_BNSD.shape[1] != k_BKTD.shape[1]
    mixed: Tensor = attend(q_BNSD, k_BKTD, v_BKTD, block_mask=_block_mask(sight, q_BNSD, compiled), enable_gqa=grouped)
    return mixed


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(sight: Sight, q: Tensor, compiled: bool) -> Any:
    """Which blocks anybody sees; all layers of a forward pass share it."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = sight.pattern.sees(query, key)
        seen = seen & (key <= query) if sight.causal else seen
        if sight.segments is None:
            return seen
        mine = sight.segments[batch, query]
        return seen & ((mine == sight.segments[batch, key]) | (mine < 0))

    length, batch = q.shape[2], None if sight.segments is None else q.shape[0]
    return sight.remembered(
        ("blocks", length), lambda: create_block_mask(rule, batch, None, length, length, device=q.device, _compile=compiled)
    )
