"""Context parallelism: the tokens of each sample are cut over ranks; attention reaches over them by a ring or by all-to-all.

Ring: every rank's keys and values travel round, and the partial results are merged by their log-sum-exp (Liu et al. 2023); each rank
has the i-th chunk of the sequence and the i-th from its end, so that causal work is even. All-to-all: every rank exchanges its share of
the tokens of all heads for all tokens of its share of the heads (Jacobs et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teratron.models import State
from teratron.models.leaves import AttentionCore, accurate
from teratron.models.random import feature_keys, keep_mask
from teratron.models.sight import Sight
from teratron.parallel.mesh import Group


def token_places(length: int, ranks: int, rank: int, balanced: bool) -> Tensor:
    """The places in a sequence that a context rank holds, int64 [length / ranks]; balanced: a chunk from each end."""
    if not balanced:
        share = length // ranks
        return torch.arange(rank * share, (rank + 1) * share)
    chunk = length // (2 * ranks)
    starts = (rank * chunk, (2 * ranks - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk) for start in starts])


def cut_tokens(tensors: State, group: Group, balanced: bool, streams: Iterable[str]) -> State:
    """This rank's share of all tensors [B, S] of a batch or state; the coordinates of whole sequences that attention needs stay."""
    if group.size == 1:
        return tensors
    names = sorted(streams, key=len, reverse=True)
    cut: State = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            cut[name] = tensor
            continue
        stream = next(prefix for prefix in names if name.startswith(prefix))
        places = token_places(tensor.shape[1], group.size, group.rank, balanced).to(tensor.device)
        cut[name] = tensor[:, places]
        if name == f"{stream}positions":
            cut[f"{stream}order"] = places.expand(tensor.shape[0], -1)
        if name in (f"{stream}segments", f"{stream}keys"):
            cut[f"{stream}whole_{name.removeprefix(stream)}"] = tensor
    return cut


class RingAttention(AttentionCore):
    """Keys and values travel round the ring; this rank's queries meet one block of them at a time."""

    def __init__(self, leaf: AttentionCore, group: Group) -> None:
        nn.Module.__init__(self)
        self.dropout, self.site, self.place, self.shares, self.group = leaf.dropout, leaf.site, leaf.place, leaf.shares, group

    def forward(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        return _ring(q_BNSD, k_BKTD, v_BKTD, self, sight, keys if self.dropout else None)

    def meeting(self, rank: int, q: Tensor, k: Tensor, sight: Sight, keys: Tensor | None) -> Meeting:
        """What there is to attend to in the block that a rank brought."""
        queries, columns, half = slice(None), slice(None), k.shape[2] // 2
        total = k.shape[2] * self.group.size
        places = token_places(total, self.group.size, rank, True).to(q.device)
        mask = sight.block(places).mask(q.shape[2], k.shape[2], q.device)
        if sight.causal and rank != self.group.rank:
            # Of a rank before this one all queries see the first chunk, none the second; of one behind, the second half of them sees both.
            queries, columns = (queries, slice(0, half)) if rank < self.group.rank else (slice(q.shape[2] // 2, None), columns)
            whole = sight.segments is None and not sight.window
            mask = None if mask is None or whole else mask[:, :, queries, columns]
        if keys is None:
            return Meeting(queries, columns, mask, None)
        heads = q.shape[1]
        of_head = feature_keys(self.site + 1, heads * self.shares, q.device)[self.place * heads :][:heads]
        of_column = feature_keys(self.site + 2, total, q.device)[places][columns]
        keep = keep_mask(keys[:, None, queries] ^ of_head[:, None], of_column, self.dropout)
        return Meeting(queries, columns, mask, keep.to(accurate(q.dtype)) * (1 / (1 - self.dropout)))


@dataclass(frozen=True)
class Meeting:
    """Which of the queries see which keys of a block, the mask among those, and the dropout factors of their weights."""

    queries: slice
    keys: slice
    mask: Tensor | None
    factors: Tensor | None


class _Ring(torch.autograd.Function):
    """Attention over all blocks; backward sends keys, values and their gradients once more round the ring."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, leaf: RingAttention, sight: Sight, keys: Tensor | None) -> Tensor:
        exact, group = accurate(q.dtype), leaf.group
        out = torch.zeros(q.shape, dtype=exact, device=q.device)
        log_sum = torch.full((*q.shape[:3], 1), -math.inf, dtype=exact, device=q.device)
        travelling = torch.stack([k, v])
        for step in range(group.size):
            arriving = torch.empty_like(travelling)
            pending = group.shift(arriving, travelling) if step < group.size - 1 else None
            meeting = leaf.meeting((group.rank - step) % group.size, q, k, sight, keys)
            at = meeting.queries
            _merge(out[:, :, at], log_sum[:, :, at], *_attend(q[:, :, at], travelling[:, :, :, meeting.keys], meeting))
            if pending is not None:
                pending.wait()
                travelling = arriving
        ctx.leaf, ctx.sight, ctx.keys = leaf, sight, keys
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, log_sum)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        exact, group, leaf = accurate(q.dtype), ctx.leaf.group, ctx.leaf
        slope = upstream[0].to(exact)
        delta = (slope * out.to(exact)).sum(-1, keepdim=True)
        grad_q = torch.zeros(q.shape, dtype=exact, device=q.device)
        travelling, grads = torch.stack([k, v]), torch.zeros((2, *k.shape), dtype=exact, device=q.device)
        for step in range(group.size):
            arriving = torch.empty_like(travelling)
            pending = group.shift(arriving, travelling) if step < group.size - 1 else None
            meeting = leaf.meeting((group.rank - step) % group.size, q, k, ctx.sight, ctx.keys)
            rows = [x[:, :, meeting.queries] for x in (q, log_sum, slope, delta)]
            grad_block, grad_kv = _attend_backward(rows, travelling[:, :, :, meeting.keys], meeting)
            grad_q[:, :, meeting.queries] += grad_block
            grads[:, :, :, meeting.keys] += grad_kv
            if pending is not None:
                pending.wait()
                travelling = arriving
            home = torch.empty_like(grads)  # they follow their keys, and after the last block go home
            group.shift(home, grads).wait()
            grads = home
        grad_k, grad_v = grads.to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _ring(q: Tensor, k: Tensor, v: Tensor, leaf: RingAttention, sight: Sight, keys: Tensor | None) -> Tensor:
    return _Ring.apply(q, k, v, leaf, sight, keys)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled scores [B, N, S, T] in the accurate type, what may not be seen at minus infinity."""
    scores = _grouped(q, k.transpose(-1, -2)).to(accurate(q.dtype)) / math.sqrt(q.shape[-1])
    return scores if mask is None else scores.masked_fill_(~mask, -math.inf)


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """a [B, N, S, X] times b [B, K, X, Y], N a multiple of K: heads of a group share b."""
    groups = b.shape[1]
    return (a.unflatten(1, (groups, -1)) @ b.unsqueeze(2)).flatten(1, 2)


def _over_group(x: Tensor, groups: int) -> Tensor:
    """Sum over the heads that share a key/value head: [B, N, ...] -> [B, K, ...]."""
    return x.unflatten(1, (groups, -1)).sum(2)


def _attend(q: Tensor, kv: Tensor, meeting: Meeting) -> tuple[Tensor, Tensor]:
    """Attention to one block, k and v stacked: the output normalised within it, and the log of its sums [B, N, S, 1]."""
    k, v = kv
    scores, factors = _scores(q, k, meeting.mask), meeting.factors
    log_sum = scores.logsumexp(-1, keepdim=True)
    weights = (scores - log_sum.clamp(min=torch.finfo(scores.dtype).min)).exp_()  # a row that sees nothing here: all zero
    weights = weights if factors is None else weights * factors
    return _grouped(weights.to(v.dtype), v).to(weights.dtype), log_sum


def _merge(out: Tensor, log_sum: Tensor, block: Tensor, block_log_sum: Tensor) -> None:
    """Join the attention to another block, in place."""
    joined = torch.logaddexp(log_sum, block_log_sum)
    known = joined.clamp(min=torch.finfo(joined.dtype).min)
    out.mul_((log_sum - known).exp()).add_(block * (block_log_sum - known).exp())
    log_sum.copy_(joined)


def _attend_backward(rows: Sequence[Tensor], kv: Tensor, meeting: Meeting) -> tuple[Tensor, Tensor]:
    """Gradients of q, and of k and v stacked, from one block; rows: q, the log of all blocks' sums, slope and delta."""
    (q, log_sum, slope, delta), (k, v) = rows, kv
    factors = meeting.factors
    weights = (_scores(q, k, meeting.mask) - log_sum).exp_()
    kept = weights if factors is None else weights * factors
    groups = k.shape[1]
    grad_v = _over_group(kept.transpose(-1, -2) @ slope, groups)
    grad_weights = _grouped(slope, v.to(slope.dtype).transpose(-1, -2))
    grad_weights = grad_weights if factors is None else grad_weights * factors
    grad_scores = weights * (grad_weights - delta) / math.sqrt(q.shape[-1])
    grad_k = _over_group(grad_scores.transpose(-1, -2) @ q.to(slope.dtype), groups)
    return _grouped(grad_scores, k.to(slope.dtype)), torch.stack([grad_k, grad_v])


class HeadExchange(AttentionCore):
    """All-to-all: each rank attends with its share of the heads over the whole sequence."""

    def __init__(self, leaf: AttentionCore, group: Group) -> None:
        super().__init__(leaf.dropout, "")
        self.site, self.group = leaf.site, group
        self.place, self.shares = leaf.place * group.size + group.rank, leaf.shares * group.size

    def forward(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        copies = max(1, self.group.size // k_BKTD.shape[1])  # fewer key/value heads than ranks: several ranks get the same
        q, k, v = (_exchange(x, self.group, True) for x in (q_BNSD, *(x.repeat_interleave(copies, 1) for x in (k_BKTD, v_BKTD))))
        return _exchange(super().forward(q, k, v, sight.whole, None if keys is None else sight.whole_keys), self.group, False)


class _Exchange(torch.autograd.Function):
    """Heads for tokens, or tokens for heads; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, heads: bool) -> Tensor:
        ctx.group, ctx.heads = group, heads
        return _swap(x, group, heads)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return _swap(upstream[0], ctx.group, not ctx.heads), None, None


def _swap(x: Tensor, group: Group, heads: bool) -> Tensor:
    """heads: [B, N, s, D] -> [B, N / ranks, S, D]; else back."""
    cut, joined = (1, 2) if heads else (2, 1)
    sent = x.unflatten(cut, (group.size, -1)).movedim(cut, 0).contiguous()
    came = torch.empty_like(sent)
    group.exchange(came, sent).wait()
    return came.movedim(0, joined).flatten(joined, joined + 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _exchange(x: Tensor, group: Group, heads: bool) -> Tensor:
    return _Exchange.apply(x, group, heads)


def apply_context(model: nn.Module, group: Group, method: str) -> None:
    """Replace every attention core by the twin that reaches over the context ranks."""
    twins: Mapping[str, Any] = {"ring": RingAttention, "all_to_all": HeadExchange}
    for module in list(model.modules()) if group.size > 1 else ():
        for name, child in list(module._modules.items()):
            if isinstance(child, AttentionCore):
                setattr(module, name, twins[method](child, group))
