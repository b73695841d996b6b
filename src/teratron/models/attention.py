"""The core of attention, a leaf: the fused kernel, or tile by tile where a pattern leaves most keys out, or in plain operations.

Shape letters: `leaves.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.blockwise import Dropped, Encounter, Shape, blockwise, capped
from teratron.models.flex import fits, flexible
from teratron.models.leaves import accurate
from teratron.models.positions import slopes
from teratron.models.products import emulated
from teratron.models.random import feature_keys, seed_of
from teratron.models.sight import Sight
from teratron.models.widened import widened_attention

MOST_ROWS, MOST_ROWS_ELSEWHERE = 128, 2048
"""Queries of a tile at most, on CPU and on other devices."""


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(d)) v with grouped key/value heads, and with dropout of its weights (contract C4).

    Scores may have a bound, and may fall with the distance of a key, in each head at its own rate.
    """

    def __init__(self, dropout: float, site: str, cap: float = 0.0, falls: bool = False) -> None:
        super().__init__()
        self.dropout, self.site, self.cap, self.falls = dropout, seed_of(site), cap, falls
        self.place, self.shares = 0, 1
        """This is the place-th of so many equal shares of the heads."""

    def forward(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        """keys: dropout keys of the queries, int32 [B, S], or None."""
        queries, columns = q_BNSD.shape[2], k_BKTD.shape[2]
        tiles = sight.tiles(queries, columns, most_rows(q_BNSD.device))
        dropped = self.dropped(keys, q_BNSD.shape[1], columns) if tiles else None
        if tiles and dropped is None and fits(q_BNSD) and not self.cap and not self.falls:
            return flexible(q_BNSD, k_BKTD, v_BKTD, sight)
        if tiles:
            shape = self.shape(q_BNSD, *sight.places(queries, columns, q_BNSD.device))
            return blockwise(q_BNSD, k_BKTD, v_BKTD, Encounter(tiles, sight.segments, sight.segments, dropped, shape))
        if self.cap or (self.dropout and keys is not None):
            return self.plain(q_BNSD, k_BKTD, v_BKTD, sight, keys)
        grouped = q_BNSD.shape[1] != k_BKTD.shape[1]
        bias = self.bias(q_BNSD, columns, sight)
        mask = sight.mask(queries, columns, q_BNSD.device) if bias is None else bias
        causal = sight.causal and mask is None
        if emulated(q_BNSD) and q_BNSD.shape[2] > 1:  # a single query needs few products, and nothing kept beside long keys
            return widened_attention(q_BNSD, k_BKTD, v_BKTD, mask, causal)
        return F.scaled_dot_product_attention(q_BNSD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def plain(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        """The twin in plain tensor operations, with dropout of attention weights when keys are given."""
        heads, groups = q_BNSD.shape[1], k_BKTD.shape[1]
        k = k_BKTD.repeat_interleave(heads // groups, dim=1)
        v = v_BKTD.repeat_interleave(heads // groups, dim=1)
        scores = capped((q_BNSD @ k.transpose(-1, -2)) / math.sqrt(q_BNSD.shape[-1]), self.cap)
        bias = self.bias(q_BNSD, k.shape[2], sight)
        mask = sight.mask(q_BNSD.shape[2], k.shape[2], scores.device)
        if mask is None and sight.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if bias is not None:
            scores = scores + bias
        elif mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1, dtype=accurate(scores.dtype)).to(scores.dtype)
        dropped = self.dropped(keys, heads, k.shape[2])
        if dropped is not None:
            rows, columns = (torch.arange(count, device=weights.device)[None] for count in weights.shape[-2:])
            weights = weights * dropped.factors(rows, columns, weights.dtype).squeeze(2)
        return weights @ v

    def slopes(self, heads: int, device: torch.device) -> Tensor:
        """How much the scores of the heads at hand fall a token, [N]."""
        return torch.tensor(slopes(heads * self.shares)[self.place * heads :][:heads], device=device, dtype=torch.float64)

    def bias(self, q_BNSD: Tensor, columns: int, sight: Sight) -> Tensor | None:
        """What is added to scores, minus infinity where nothing is seen; None = nothing."""
        return self.fall(q_BNSD, columns, sight) if sight.relative is None else sight.bias(q_BNSD.shape[2], columns)

    def fall(self, q_BNSD: Tensor, columns: int, sight: Sight) -> Tensor | None:
        """What the distance adds to scores, in the queries' type; None = nothing. Layers share it."""
        if not self.falls:
            return None
        heads, queries = q_BNSD.shape[1:3]
        made: Tensor = sight.remembered(
            ("fall", queries, columns, heads, self.place, q_BNSD.dtype),
            lambda: sight.fall(self.slopes(heads, q_BNSD.device), queries, columns).to(q_BNSD.dtype),
        )
        return made

    def shape(self, q_BNSD: Tensor, of_queries: Tensor, of_keys: Tensor) -> Shape:
        """What becomes of scores tile by tile; of_queries, of_keys: their places, int64 [1, S] and [1, T]."""
        if not self.falls:
            return Shape(self.cap)
        return Shape(self.cap, self.slopes(q_BNSD.shape[1], q_BNSD.device), of_queries[0], of_keys[0])

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


def mixed(core: AttentionCore, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTX: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
    """What a core makes of values narrower than keys, [B, N, S, X]: kernels want both alike."""
    width = v_BKTX.shape[-1]
    wide: Tensor = core(q_BNSD, k_BKTD, F.pad(v_BKTX, (0, k_BKTD.shape[-1] - width)), sight, keys)
    return wide[..., :width]


def heads_of(x_BSF: Tensor, head_features: int) -> Tensor:
    """Features as heads, [B, N, S, D]."""
    return x_BSF.unflatten(-1, (-1, head_features)).transpose(1, 2)
