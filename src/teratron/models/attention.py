"""The core of attention, a leaf: the fused kernel, or tile by tile where a pattern leaves most keys out, or in plain operations.

Shape letters: `leaves.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.blockwise import Dropped, Encounter, blockwise
from teratron.models.flex import fits, flexible
from teratron.models.leaves import accurate
from teratron.models.random import feature_keys, seed_of
from teratron.models.sight import Sight

MOST_ROWS, MOST_ROWS_ELSEWHERE = 128, 2048
"""Queries of a tile at most, on CPU and on other devices."""


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(d)) v with grouped key/value heads, and with dropout of its weights (contract C4)."""

    def __init__(self, dropout: float, site: str) -> None:
        super().__init__()
        self.dropout, self.site = dropout, seed_of(site)
        self.place, self.shares = 0, 1
        """This is the place-th of so many equal shares of the heads."""

    def forward(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        """keys: dropout keys of the queries, int32 [B, S], or None."""
        queries, columns = q_BNSD.shape[2], k_BKTD.shape[2]
        tiles = sight.tiles(queries, columns, most_rows(q_BNSD.device))
        dropped = self.dropped(keys, q_BNSD.shape[1], columns) if tiles else None
        if tiles and dropped is None and fits(q_BNSD):
            return flexible(q_BNSD, k_BKTD, v_BKTD, sight)
        if tiles:
            return blockwise(q_BNSD, k_BKTD, v_BKTD, Encounter(tiles, sight.segments, sight.segments, dropped))
        if self.dropout and keys is not None:
            return self.plain(q_BNSD, k_BKTD, v_BKTD, sight, keys)
        grouped = q_BNSD.shape[1] != k_BKTD.shape[1]
        mask = sight.mask(queries, columns, q_BNSD.device)
        causal = sight.causal and mask is None
        return F.scaled_dot_product_attention(q_BNSD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def plain(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        """The twin in plain tensor operations, with dropout of attention weights when keys are given."""
        heads, groups = q_BNSD.shape[1], k_BKTD.shape[1]
        k = k_BKTD.repeat_interleave(heads // groups, dim=1)
        v = v_BKTD.repeat_interleave(heads // groups, dim=1)
        scores = (q_BNSD @ k.transpose(-1, -2)) / math.sqrt(q_BNSD.shape[-1])
        mask = sight.mask(q_BNSD.shape[2], k.shape[2], scores.device)
        if mask is None and sight.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1, dtype=accurate(scores.dtype)).to(scores.dtype)
        dropped = self.dropped(keys, heads, k.shape[2])
        if dropped is not None:
            rows, columns = (torch.arange(count, device=weights.device)[None] for count in weights.shape[-2:])
            weights = weights * dropped.factors(rows, columns, weights.dtype).squeeze(2)
        return weights @ v

    def dropped(self, keys: Tensor | None, heads: int, columns: int) -> Dropped | None:
        """Which weights are dropped; keys: of the queries. None = none."""
        if keys is None or not self.dropout:
            return None
        # One key a head and one a column, so that neither needs the other's number.
        of_head = feature_keys(self.site + 1, heads * self.shares, keys.device)[self.place * heads :][:heads]
        return Dropped(self.dropout, keys, of_head, feature_keys(self.site + 2, columns, keys.device))


def most_rows(device: torch.device) -> int:
    """Queries of a tile at most."""
    return MOST_ROWS if device.type == "cpu" else MOST_ROWS_ELSEWHERE
