"""Two-stream attention with relative positions: XLNet's (Yang et al. 2019), with the content alone Transformer-XL's (Dai et al. 2019).

Shape letters: see `leaves.py`; here also M stretches of a sample, Q tokens of one in a stream, P predicted tokens, Z distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.attention import AttentionCore, heads_of
from teratron.models.blocks import Block
from teratron.models.leaves import Leaf, Linear, Part, accurate
from teratron.models.plan import COLUMNS, FEED_FORWARD, RESIDUAL_NORM, ROWS, Cut, Layout, Plan, under
from teratron.models.units import Shared, State

CONTENT, QUERIES = "hidden", "queries"
"""The streams by the names that they have in a state: every token, and the predicted ones as seen by those that may not know them."""


@dataclass(frozen=True, eq=False)
class View:
    """What the tokens of a stream see of the content; each stretch of a sample is a row of its own."""

    seen: Tensor
    """bool [B M, 1, Q, T]: T tokens of the stretch, and where there is a memory of the one before, may be seen."""
    distance: Tensor
    """int64 [B M or 1, 1, Q, T]: which distance lies between the two."""
    keys: Tensor | None
    """Dropout keys int32 of the stream's tokens, [B, M Q]; None = no dropout."""


@dataclass(frozen=True)
class Streams(Shared):
    """What the units share; the content's positions and keys are those of the base."""

    views: Mapping[str, View] = field(default_factory=dict)
    """By stream."""
    distances_1ZH: Tensor | None = None
    """Sinusoids of all distances between a token and what it sees."""
    stretches: int = 1
    """Into how many a sample is cut: beside itself each sees the one before, through which no gradient flows."""

    def folded(self, x: Tensor) -> Tensor:
        """A sample's stretches as rows: [B, M Q, ...] -> [B M, Q, ...]."""
        return x.unflatten(1, (self.stretches, -1)).flatten(0, 1)

    def unfolded(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.stretches)).flatten(1, 2)

    def with_memory(self, x: Tensor, past: Tensor, nothing: int = 0) -> Tensor:
        """Each stretch of x [B, S, ...] behind the one before it in `past`, the first behind `nothing`: [B M, T, ...]."""
        own, before = x.unflatten(1, (self.stretches, -1)), past.unflatten(1, (self.stretches, -1))
        before = torch.cat([torch.full_like(before[:, :1], nothing), before[:, :-1]], dim=1)
        return torch.cat([before, own], dim=2).flatten(0, 1)


def sinusoids(count: int, lowest: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of `count` distances from the lowest on: sines, then cosines, [1, Z, H]; in float32 for half types."""
    exact = accurate(dtype)
    frequencies = 1 / 10000 ** (torch.arange(0, width, 2, dtype=exact, device=device) / width)
    angles = torch.arange(lowest, lowest + count, dtype=exact, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[None].to(dtype)


class HeadBias(Leaf):
    """A vector for every head, side by side."""

    def __init__(self, width: int, granule: int, std: float) -> None:
        super().__init__()
        self.granule, self.std = granule, std
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_BSF: Tensor) -> Tensor:
        return x_BSF + self.weight

    def leaf_parts(self) -> Iterator[Part]:
        yield Part(".weight", "weight", 0, tuple(self.weight.shape), self.std)

    def hold(self, pieces: list[Part]) -> None:
        """Keep only these heads'."""
        self.pieces = pieces
        self.weight = nn.Parameter(torch.empty(pieces[0].size))


class RelativeCore(AttentionCore):
    """softmax((q k^T + q' r^T) / sqrt(d)) v, where r belongs to the distance of the two. A query that sees nothing gets nothing."""

    def forward(  # type: ignore[override]
        self, q_BNQD: Tensor, q_distance_BNQD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, r_1NZD: Tensor, view: View, keys: Tensor | None
    ) -> Tensor:
        """keys: dropout keys [B, Q] of the queries, or None."""
        apart = (q_distance_BNQD @ r_1NZD.mT).gather(-1, view.distance.expand(*q_BNQD.shape[:3], k_BNTD.shape[2]))
        scores = (q_BNQD @ k_BNTD.mT + apart) / math.sqrt(q_BNQD.shape[-1])
        scores = scores.masked_fill(~view.seen, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=accurate(scores.dtype)).to(scores.dtype).masked_fill(~view.seen, 0.0)
        dropped = self.dropped(keys, weights.shape[1], weights.shape[3])
        if dropped is not None:
            rows, columns = (torch.arange(count, device=weights.device)[None] for count in weights.shape[-2:])
            weights = weights * dropped.factors(rows, columns, weights.dtype).squeeze(2)
        return weights @ v_BNTD


class TwoStreamAttention(nn.Module):
    """Attention of every stream to the content, by the same weights. As published its products have no biases."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        self.head_features = granule = config.head_features
        width, inner, std = config.hidden, config.heads * granule, config.matrix_std
        self.q = Linear(width, inner, False, std, granule)
        self.kv = Linear(width, {"k": inner, "v": inner}, False, std, granule)
        self.distance = Linear(width, inner, False, std, granule)
        self.content_bias, self.distance_bias = HeadBias(inner, granule, std), HeadBias(inner, granule, std)
        self.core = RelativeCore(config.attention_dropout, f"{site}.core")
        self.output = Linear(inner, width, False, std / math.sqrt(2 * config.layers))

    def forward(self, x: Mapping[str, Tensor], shared: Streams) -> dict[str, Tensor]:
        """x [B, S, H] and [B, P, H] by stream, and so the result."""
        k, v = (heads_of(part, self.head_features) for part in self._seen(x[CONTENT], shared).chunk(2, dim=-1))
        r = heads_of(self.distance(shared.distances_1ZH), self.head_features)
        mixed = {}
        for name, view in shared.views.items():
            q = shared.folded(self.q(x[name]))
            both = (heads_of(bias(q), self.head_features) for bias in (self.content_bias, self.distance_bias))
            keys = None if view.keys is None else shared.folded(view.keys)
            heads = self.core(*both, k, v, r, view, keys)
            mixed[name] = self.output(shared.unfolded(heads.transpose(1, 2).flatten(2)))
        return mixed

    def _seen(self, x_BSH: Tensor, shared: Streams) -> Tensor:
        """Keys and values of what each stretch sees, [B M, T, 2 F]; the memory teaches the weights, but not the layers below."""
        own = self.kv(x_BSH)
        return own if shared.stretches == 1 else shared.with_memory(own, self.kv(x_BSH.detach()))


class TwoStreamBlock(Block):
    """One layer of all streams."""

    def __init__(self, config: ModelConfig, layer: int, site: str) -> None:
        super().__init__(config, layer, site)
        self.attention = TwoStreamAttention(config, f"{site}.attention")

    def forward(self, state: State, shared: Streams) -> State:  # type: ignore[override]
        mixed = self.attention({name: self._before("attention", state[name]) for name in shared.views}, shared)
        made = {}
        for name, view in shared.views.items():
            hidden = self._added("attention", state[name], mixed[name], view.keys)
            made[name] = self._added("ffn", hidden, self.ffn(self._before("ffn", hidden)), view.keys)
        return {**state, **made}


_W, _R, _F = Layout.WHOLE, Layout.RESIDUAL, Layout.FEATURES
BLOCK: Plan = {
    "attention_norm": RESIDUAL_NORM,
    "attention.q": Cut(_R, _F, COLUMNS),
    "attention.kv": Cut(_R, _F, COLUMNS),
    "attention.distance": Cut(_W, _F, {"weight": 0}),
    "attention.content_bias": Cut(_F, _F, {"weight": 0}),
    "attention.distance_bias": Cut(_F, _F, {"weight": 0}),
    "attention.core": Cut(_F, _F),
    "attention.output": Cut(_F, _R, ROWS),
    "attention_dropout": Cut(_R, _R),
    "ffn_norm": RESIDUAL_NORM,
    "ffn_dropout": Cut(_R, _R),
    **under("ffn", FEED_FORWARD),
}
