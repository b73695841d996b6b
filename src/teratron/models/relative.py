"""Relative positions in buckets: a bias of attention's scores for each head and distance, one table a stack (Raffel et al. 2020).

The table has one owner, the unit that begins a stack; what follows is handed its values in the state, also over stages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teratron.config import ModelConfig
from teratron.models.leaves import Embedding

RELATIVE = "relative"
"""Of a state: the biases [buckets, N] of the heads at hand."""


class RelativeTable(Embedding):
    """Biases of all buckets and heads; called, it gives them for the state."""

    def forward(self) -> Tensor:  # type: ignore[override]
        return self.weight.clone()  # what is handed on outlives a weight that is given back


def relative_table(config: ModelConfig) -> RelativeTable | None:
    """That of a stack, where positions are relative."""
    return RelativeTable(config.relative_buckets, config.heads, config.init_std) if config.position == "relative" else None


def relative_shape(config: ModelConfig, tensor_ranks: int) -> tuple[int, int]:
    """Of the biases that a rank's heads have."""
    return config.relative_buckets, config.heads // tensor_ranks


def buckets_of(apart: Tensor, causal: bool, count: int, furthest: int) -> Tensor:
    """The bucket of each distance, key's place minus query's, int64.

    Half of the buckets are for one distance each, the others grow with its logarithm up to `furthest`, beyond which all are one.
    With attention in both directions later keys have a half of the buckets for themselves.
    """
    if causal:
        first, steps = torch.zeros_like(apart), (-apart).clamp(min=0)
    else:
        count //= 2
        first, steps = (apart > 0) * count, apart.abs()
    exact = count // 2
    # In float32 whatever the model computes in, as T5 has it: buckets must not depend on the precision.
    share = torch.log(steps.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = exact + (share * (count - exact)).long()
    return first + torch.where(steps < exact, steps, far.clamp(max=count - 1))


def bias_by_distance(table: Tensor, causal: bool, furthest: int, queries: int, keys: int) -> Tensor:
    """Biases [1, N, S, T] of places 0, 1, ...: those of each distance, laid out along the diagonals."""
    apart = torch.arange(1 - queries, keys, device=table.device)
    values = table[buckets_of(apart, causal, len(table), furthest)].t()
    return values.unfold(-1, keys, 1).flip(1).unsqueeze(0)


def bias_by_place(table: Tensor, causal: bool, furthest: int, query: Tensor, key: Tensor) -> Tensor:
    """Biases [B or 1, N, S, T] of any places, [B or 1, S] and [B or 1, T]."""
    apart = key[:, None, :] - query[:, :, None]
    return table[buckets_of(apart, causal, len(table), furthest)].movedim(-1, 1)
