"""Context parallelism: the tokens of each sample are cut over ranks; attention reaches over them by a ring or by all-to-all.

Ring: every rank's keys and values travel round, and the partial results are merged by their log-sum-exp (Liu et al. 2023); each rank
has the i-th chunk of the sequence and the i-th from its end, so that causal work is even. All-to-all: every rank exchanges its share of
the tokens of all heads for all tokens of its share of the heads (Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from teratron.models import State
from teratron.models.attention import AttentionCore, most_rows
from teratron.models.blockwise import Encounter, Later, attend, attend_backward, nothing_yet, ready_for_backward
from teratron.models.patterns import tiles_of
from teratron.models.sight import Sight
from teratron.parallel.mesh import Group


def token_runs(length: int, ranks: int, rank: int, balanced: bool) -> tuple[range, ...]:
    """The places in a sequence that a context rank holds; balanced: a chunk from each end."""
    if not balanced:
        share = length // ranks
        return (range(rank * share, (rank + 1) * share),)
    chunk = length // (2 * ranks)
    return tuple(range(start, start + chunk) for start in (rank * chunk, (2 * ranks - 1 - rank) * chunk))


def token_places(length: int, ranks: int, rank: int, balanced: bool) -> Tensor:
    """The same as a tensor, int64 [length / ranks]."""
    return torch.cat([torch.arange(run.start, run.stop) for run in token_runs(length, ranks, rank, balanced)])


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
        if name in (f"{stream}segments", f"{stream}keys", f"{stream}prefix"):
            cut[f"{stream}whole_{name.removeprefix(stream)}"] = tensor
    return cut


class RingAttention(AttentionCore):
    """Keys and values travel round the ring; this rank's queries meet those of one rank at a time."""

    def __init__(self, leaf: AttentionCore, group: Group) -> None:
        nn.Module.__init__(self)
        self.dropout, self.site, self.place, self.shares, self.group = leaf.dropout, leaf.site, leaf.place, leaf.shares, group
        self.cap, self.falls = leaf.cap, leaf.falls

    def forward(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        return _ring(q_BNSD, k_BKTD, v_BKTD, self, sight, keys)

    def encounter(self, rank: int, q: Tensor, k: Tensor, sight: Sight, keys: Tensor | None) -> Encounter:
        """With the keys that a rank has brought; what no query sees is not computed."""
        ranks, total = self.group.size, k.shape[2] * self.group.size
        mine, theirs = token_runs(q.shape[2] * ranks, ranks, self.group.rank, True), token_runs(total, ranks, rank, True)
        causal = sight.causal and sight.prefix is None
        tiles = tiles_of(sight.pattern, causal, mine, theirs, most_rows(q.device))
        places = token_places(total, ranks, rank, True).to(q.device)
        of_queries = token_places(q.shape[2] * ranks, ranks, self.group.rank, True).to(q.device)
        segments = sight.whole_segments if sight.key_segments is None else sight.key_segments
        dropped = self.dropped(keys, q.shape[1], total)
        return Encounter(
            tiles,
            sight.segments,
            None if segments is None else segments[:, places],
            None if dropped is None else replace(dropped, of_column=dropped.of_column[places]),
            self.shape(q, of_queries[None], places[None]),
            self.prefixed(q.shape[2] * ranks, places, sight) if sight.prefix is not None else None,
        )

    def prefixed(self, total: int, places: Tensor, sight: Sight) -> Later:
        """What of later keys is seen, of all those at some places."""
        assert sight.whole_prefix is not None
        mine = token_places(total, self.group.size, self.group.rank, True).to(places.device)
        return Later(mine, places, sight.whole_prefix[:, places])


class _Ring(torch.autograd.Function):
    """Attention to the keys of all ranks; backward sends keys, values and their gradients once more round the ring."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, leaf: RingAttention, sight: Sight, keys: Tensor | None) -> Tensor:
        group = leaf.group
        out, log_sum = nothing_yet(q)
        travelling = torch.stack([k, v])
        for step in range(group.size):
            arriving = torch.empty_like(travelling)
            pending = group.shift(arriving, travelling) if step < group.size - 1 else None
            attend(out, log_sum, q, travelling, leaf.encounter((group.rank - step) % group.size, q, k, sight, keys))
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
        group, leaf = ctx.leaf.group, ctx.leaf
        of_queries, grad_q = ready_for_backward(q, out, log_sum, upstream[0])
        travelling, grads = torch.stack([k, v]), grad_q.new_zeros(2, *k.shape)
        for step in range(group.size):
            arriving = torch.empty_like(travelling)
            pending = group.shift(arriving, travelling) if step < group.size - 1 else None
            encounter = leaf.encounter((group.rank - step) % group.size, q, k, ctx.sight, ctx.keys)
            attend_backward(grad_q, grads, of_queries, travelling, encounter)
            if pending is not None:
                pending.wait()
                travelling = arriving
            home = torch.empty_like(grads)  # they follow their keys, and after the last rank go home
            group.shift(home, grads).wait()
            grads = home
        grad_k, grad_v = grads.to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _ring(q: Tensor, k: Tensor, v: Tensor, leaf: RingAttention, sight: Sight, keys: Tensor | None) -> Tensor:
    return _Ring.apply(q, k, v, leaf, sight, keys)


class HeadExchange(AttentionCore):
    """All-to-all: each rank attends with its share of the heads over the whole sequence."""

    def __init__(self, leaf: AttentionCore, group: Group) -> None:
        super().__init__(leaf.dropout, "", leaf.cap, leaf.falls)
        self.site, self.group = leaf.site, group
        self.place, self.shares = leaf.place * group.size + group.rank, leaf.shares * group.size

    def forward(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        copies = max(1, self.group.size // k_BKTD.shape[1])  # fewer key/value heads than ranks: several ranks get the same
        q, k, v = (_exchange(x, self.group, True) for x in (q_BNSD, *(x.repeat_interleave(copies, 1) for x in (k_BKTD, v_BKTD))))
        whole = sight.whole
        if sight.relative is not None:
            whole = replace(whole, relative=sight.relative.chunk(self.group.size, 1)[self.group.rank])
        return _exchange(super().forward(q, k, v, whole, None if keys is None else sight.whole_keys), self.group, False)


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
