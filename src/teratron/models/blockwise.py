"""Attention tile by tile: the twin of the dense kernel that computes only what a pattern lets see, in memory linear in the length.

Partial results are merged by the logarithms of their sums (Dao et al. 2022), so that keys may come in any order and number; ring
attention is the same with keys that travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teratron.models.leaves import accurate
from teratron.models.patterns import Tiles
from teratron.models.random import keep_mask

MOST_SCORES, MOST_SCORES_ELSEWHERE = 2**19, 2**27
"""Scores that are computed at once: on CPU so few that they stay in its cache."""


@dataclass(frozen=True)
class Dropped:
    """Which attention weights are dropped: a function of query, head and key alone."""

    probability: float
    keys: Tensor
    """Dropout keys of the queries, int32 [B, S]."""
    of_head: Tensor
    """int32 [N]."""
    of_column: Tensor
    """int32 [T]."""

    def factors(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """What the weights of queries [n, b] on keys [n, m] are multiplied with, [B, N, n, b, m]."""
        of_query = self.keys[:, None, rows] ^ self.of_head[:, None, None]
        return keep_mask(of_query, self.of_column[columns][:, None], self.probability).to(dtype) * (1 / (1 - self.probability))


@dataclass(frozen=True)
class Shape:
    """What becomes of scores before the softmax."""

    cap: float = 0.0
    """Their bound; 0 = none."""
    slopes: Tensor | None = None
    """How much they fall a token of distance, [N]; None = not."""
    places: Tensor | None = None
    """Of the queries, int64 [S]; with slopes alone."""
    key_places: Tensor | None = None
    """int64 [T]."""

    def fall(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of queries [n, b] and keys [n, m], [N, n, b, m]."""
        if self.slopes is None or self.places is None or self.key_places is None:
            return None
        apart = self.key_places[columns].unsqueeze(-2) - self.places[rows].unsqueeze(-1)
        return (-self.slopes[:, None, None, None] * apart.abs()).to(dtype)


PLAIN = Shape()


def capped(scores: Tensor, cap: float) -> Tensor:
    """cap * tanh(scores / cap); 0 = as they are."""
    return cap * (scores / cap).tanh() if cap else scores


@dataclass(frozen=True)
class Later:
    """That queries see no later key but those of a prefix."""

    places: Tensor
    """Of the queries, int64 [S]."""
    key_places: Tensor
    """int64 [T]."""
    prefix: Tensor
    """Keys that all see, bool [B, T]."""

    def unseen(self, rows: Tensor, columns: Tensor) -> Tensor:
        """True where queries [n, b] do not see keys [n, m], [B, 1, n, b, m]."""
        later = self.key_places[columns].unsqueeze(-2) > self.places[rows].unsqueeze(-1)
        return (later & ~self.prefix[:, columns].unsqueeze(-2)).unsqueeze(1)


@dataclass(frozen=True)
class Encounter:
    """Queries that meet keys."""

    tiles: tuple[Tiles, ...]
    segments: Tensor | None = None
    """Documents of the queries, int64 [B, S]; padding is -1."""
    key_segments: Tensor | None = None
    """int64 [B, T]."""
    dropped: Dropped | None = None
    shape: Shape = PLAIN
    later: Later | None = None
    """None = the tiles say all of what is later."""

    def pieces(self, q: Tensor) -> Iterator[Piece]:
        """The tiles as tensors, so many at a time as memory allows; q [B, N, S, D]."""
        most = MOST_SCORES if q.device.type == "cpu" else MOST_SCORES_ELSEWHERE
        for tiles in self.tiles:
            count = max(1, most * len(tiles.rows) // (q.shape[0] * q.shape[1] * tiles.area))
            unseen = None if tiles.unseen is None else torch.as_tensor(tiles.unseen, device=q.device)
            for start in range(0, len(tiles.rows), count):
                some = slice(start, start + count)
                rows, columns = (torch.as_tensor(places[some], device=q.device) for places in (tiles.rows, tiles.columns))
                factors = None if self.dropped is None else self.dropped.factors(rows, columns, accurate(q.dtype))
                fall = self.shape.fall(rows, columns, accurate(q.dtype))
                yield Piece(rows, columns, self._unseen(unseen, rows, columns), factors, self.shape.cap, fall)

    def _unseen(self, unseen: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor | None:
        if self.later is not None:
            later = self.later.unseen(rows, columns)
            unseen = later if unseen is None else later | unseen
        if self.segments is None or self.key_segments is None:
            return unseen
        mine, theirs = self.segments[:, rows].unsqueeze(-1), self.key_segments[:, columns].unsqueeze(-2)
        foreign = ((mine != theirs) & (mine >= 0)).unsqueeze(1)
        return foreign if unseen is None else foreign | unseen


@dataclass(frozen=True)
class Piece:
    """Tiles that are computed together."""

    rows: Tensor
    """int64 [n, b]."""
    columns: Tensor
    """int64 [n, m]."""
    unseen: Tensor | None
    """True where a query does not see a key; broadcasts to [B, N, n, b, m]."""
    factors: Tensor | None
    """What dropout multiplies weights with."""
    cap: float
    """The scores' bound; 0 = none."""
    fall: Tensor | None
    """What is added to scores, [N, n, b, m]."""

    def of_queries(self, x: Tensor) -> Tensor:
        """[..., S, X] -> [..., n, b, X]."""
        return x.index_select(-2, self.rows.flatten()).unflatten(-2, self.rows.shape)

    def of_keys(self, x: Tensor) -> Tensor:
        """[..., T, X] -> [..., n, m, X]."""
        return x.index_select(-2, self.columns.flatten()).unflatten(-2, self.columns.shape)


def blockwise(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, encounter: Encounter) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over an encounter's tiles, [B, N, S, D], with grouped key/value heads."""
    return _run(q_BNSD, k_BKTD, v_BKTD, encounter)


def attend(out: Tensor, log_sum: Tensor, q: Tensor, kv: Tensor, encounter: Encounter) -> None:
    """Add an encounter to attention's result [B, N, S, D] and the log of its sums [B, N, S, 1], in place.

    Both begin empty, as `nothing_yet` makes them. kv: keys and values stacked, [2, B, K, T, D].
    """
    for piece in encounter.pieces(q):
        rows, places = piece.of_queries, piece.rows.flatten()
        block, block_sum = _attend(rows(q), piece.of_keys(kv), piece)
        before = rows(log_sum)
        joined = torch.logaddexp(before, block_sum)
        known = joined.clamp(min=torch.finfo(joined.dtype).min)
        merged = rows(out).mul_((before - known).exp_()).add_(block.mul_((block_sum - known).exp_()))
        out.index_copy_(2, places, merged.flatten(2, 3))
        log_sum.index_copy_(2, places, joined.flatten(2, 3))


def attend_backward(grad_q: Tensor, grad_kv: Tensor, of_queries: Sequence[Tensor], kv: Tensor, encounter: Encounter) -> None:
    """Add an encounter's gradients, in place.

    of_queries: q, the log of the sums of all encounters, slope (the gradient of the output), and the sum of slope * output.
    """
    for piece in encounter.pieces(of_queries[0]):
        block, block_kv = _attend_backward([piece.of_queries(x) for x in of_queries], piece.of_keys(kv), piece)
        grad_q.index_add_(2, piece.rows.flatten(), block.flatten(2, 3))
        grad_kv.index_add_(3, piece.columns.flatten(), block_kv.flatten(3, 4))


def nothing_yet(q: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the log of the sums of queries that have met no key."""
    exact = accurate(q.dtype)
    return torch.zeros(q.shape, dtype=exact, device=q.device), q.new_full((*q.shape[:3], 1), -math.inf, dtype=exact)


class _Blockwise(torch.autograd.Function):
    """One encounter; nothing but inputs, output and sums is kept for backward, which computes the scores anew."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, encounter: Encounter) -> Tensor:
        out, log_sum = nothing_yet(q)
        attend(out, log_sum, q, torch.stack([k, v]), encounter)
        ctx.encounter, result = encounter, out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, log_sum)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        of_queries, grad_q = ready_for_backward(q, out, log_sum, upstream[0])
        grad_kv = grad_q.new_zeros(2, *k.shape)
        attend_backward(grad_q, grad_kv, of_queries, torch.stack([k, v]), ctx.encounter)
        return grad_q.to(q.dtype), *grad_kv.to(k.dtype), None


def ready_for_backward(q: Tensor, out: Tensor, log_sum: Tensor, upstream: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """What `attend_backward` needs of the queries, and their gradient, still zero."""
    slope = upstream.to(log_sum.dtype)
    delta = (slope * out.to(slope.dtype)).sum(-1, keepdim=True)
    return (q, log_sum, slope, delta), torch.zeros(q.shape, dtype=slope.dtype, device=q.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(q: Tensor, k: Tensor, v: Tensor, encounter: Encounter) -> Tensor:
    return _Blockwise.apply(q, k, v, encounter)


def _attend(q: Tensor, kv: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """Attention within tiles, [B, N, n, b, D]: the output normalised there, and the log of its sums [B, N, n, b, 1]."""
    k, v = kv
    scores = _scores(q, k, piece)
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # a row that sees nothing here: all zero
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    weights = weights if piece.factors is None else weights.mul_(piece.factors)
    block = _grouped(weights.to(v.dtype), v).to(weights.dtype)
    return block.div_(total.clamp(min=1)), total.log_().add_(peak)  # a row that sees something sums to 1 at least


def _attend_backward(of_queries: Sequence[Tensor], kv: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """Gradients of q, and of k and v stacked, within tiles."""
    (q, log_sum, slope, delta), (k, v) = of_queries, kv
    scores = _scores(q, k, piece)
    weights = scores.sub(log_sum).exp_()
    grad_weights = _grouped(slope, v.to(slope.dtype).transpose(-1, -2))
    kept = weights
    if piece.factors is not None:
        kept, grad_weights = weights * piece.factors, grad_weights.mul_(piece.factors)
    groups = k.shape[1]
    grad_v = _over_group(kept.transpose(-1, -2) @ slope, groups)
    grad_scores = grad_weights.sub_(delta).mul_(weights).mul_(1 / math.sqrt(q.shape[-1]))
    if piece.cap:
        bounded = scores if piece.fall is None else scores.sub_(piece.fall)
        grad_scores.mul_((bounded / piece.cap).square_().neg_().add_(1).clamp_(min=0))  # nothing where a key is not seen
    grad_k = _over_group(grad_scores.transpose(-1, -2) @ q.to(slope.dtype), groups)
    return _grouped(grad_scores, k.to(slope.dtype)), torch.stack([grad_k, grad_v])


def _scores(q: Tensor, k: Tensor, piece: Piece) -> Tensor:
    """Scaled scores [B, N, n, b, m] in the accurate type, what is not seen at minus infinity."""
    scores = capped(_grouped(q, k.transpose(-1, -2)).to(accurate(q.dtype)).mul_(1 / math.sqrt(q.shape[-1])), piece.cap)
    if piece.fall is not None:
        scores.add_(piece.fall)
    return scores if piece.unseen is None else scores.masked_fill_(piece.unseen, -math.inf)


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """a [B, N, n, X, Y] times b [B, K, n, Y, Z], N a multiple of K: heads of a group share b."""
    groups = b.shape[1]
    return (a.unflatten(1, (groups, -1)) @ b.unsqueeze(2)).flatten(1, 2)


def _over_group(x: Tensor, groups: int) -> Tensor:
    """Sum over the heads that share a key/value head: [B, N, ...] -> [B, K, ...]."""
    return x.unflatten(1, (groups, -1)).sum(2)
