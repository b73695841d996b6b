"""The leaf modules that every family is made of; `parallel/` replaces leaves by their parallel twins (contract C6).

Shapes are named by suffix letters: B batch, S sequence, H hidden, N query heads, K key/value heads, D head dimension,
F feed-forward, V vocabulary, T tokens. A fused leaf holds several parts in adjacent rows (contract C7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.random import feature_keys, keep_mask, seed_of


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums and exponentials of `dtype` are computed: float32 for half types, else itself (contract C9)."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Part:
    """A named piece of a parameter: rows [start, start + shape[0]) of dimension 0.

    A leaf yields its own with names below it; `parts_of` makes the names full.
    """

    name: str
    """Below the leaf's parent (`q.weight`), below the leaf itself (`.weight`), or in full (`/embedding.tokens.weight`)."""
    parameter: str
    """Attribute of the leaf that holds it."""
    start: int
    shape: tuple[int, ...]
    """Full, unpadded shape."""
    std: float | None
    """Standard deviation of the initial normal values; None = the constant in `fill`."""
    fill: float = 0.0

    def of(self, tensor: Tensor) -> Tensor:
        """This part's view of a tensor shaped like its parameter."""
        return tensor[self.start : self.start + self.shape[0]]


class Linear(nn.Module):
    """y = x W^T + b. `outputs` is a width, or named widths of parts that are computed in one product."""

    def __init__(self, inputs: int, outputs: int | Mapping[str, int], bias: bool, std: float) -> None:
        super().__init__()
        self.widths = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        self.std = std
        self.weight = nn.Parameter(torch.empty(sum(self.widths.values()), inputs))
        self.bias = nn.Parameter(torch.empty(sum(self.widths.values()))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def leaf_parts(self) -> Iterator[Part]:
        start = 0
        for name, width in self.widths.items():
            yield Part(f"{name}.weight", "weight", start, (width, self.weight.shape[1]), self.std)
            if self.bias is not None:
                yield Part(f"{name}.bias", "bias", start, (width,), None)
            start += width


class Embedding(nn.Module):
    """A table of `count` rows, padded in memory to a multiple of `multiple`; the padding is no part and never looked up."""

    def __init__(self, count: int, width: int, std: float, multiple: int = 1) -> None:
        super().__init__()
        self.count, self.std = count, std
        self.weight = nn.Parameter(torch.empty(-(-count // multiple) * multiple, width))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)

    def leaf_parts(self) -> Iterator[Part]:
        yield Part(".weight", "weight", 0, (self.count, self.weight.shape[1]), self.std)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension; statistics in float32 for half types."""

    def __init__(self, width: int, kind: str, bias: bool, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias and kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def leaf_parts(self) -> Iterator[Part]:
        yield Part(".weight", "weight", 0, tuple(self.weight.shape), None, fill=1.0)
        if self.bias is not None:
            yield Part(".bias", "bias", 0, tuple(self.bias.shape), None)


class Dropout(nn.Module):
    """Dropout whose mask is a function of the token's key and the feature (contract C4); off without keys."""

    def __init__(self, probability: float, site: str) -> None:
        super().__init__()
        self.probability, self.site = probability, seed_of(site)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [B, S, H], keys int32 [B, S] or None."""
        if keys is None or self.probability == 0:
            return x
        keep = keep_mask(keys, feature_keys(self.site, x.shape[-1], x.device), self.probability)
        return x * keep * (1 / (1 - self.probability))


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(d)) v with grouped key/value heads; the fused kernel unless attention weights are dropped."""

    def __init__(self, dropout: float, site: str) -> None:
        super().__init__()
        self.dropout, self.site = dropout, seed_of(site)

    def forward(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor | None, keys: Tensor | None) -> Tensor:
        """mask: bool [B or 1, 1, S, T] of what may be seen, or None for causal; keys: dropout keys of the queries or None."""
        if self.dropout and keys is not None:
            return self.plain(q_BNSD, k_BKTD, v_BKTD, mask, keys)
        grouped = q_BNSD.shape[1] != k_BKTD.shape[1]
        return F.scaled_dot_product_attention(q_BNSD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)

    def plain(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor | None, keys: Tensor | None) -> Tensor:
        """The twin in plain tensor operations, with dropout of attention weights when keys are given."""
        heads, groups, columns = q_BNSD.shape[1], k_BKTD.shape[1], k_BKTD.shape[2]
        k = k_BKTD.repeat_interleave(heads // groups, dim=1)
        v = v_BKTD.repeat_interleave(heads // groups, dim=1)
        scores = (q_BNSD @ k.transpose(-1, -2)) / math.sqrt(q_BNSD.shape[-1])
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=accurate(scores.dtype)).to(scores.dtype)
        if keys is not None:
            # One key a head and one a column, so that neither needs the other's number.
            of_head, of_column = (feature_keys(self.site + n, count, scores.device) for n, count in ((1, heads), (2, columns)))
            keep = keep_mask(keys[:, None] ^ of_head[:, None], of_column, self.dropout)
            weights = weights * keep * (1 / (1 - self.dropout))
        return weights @ v
