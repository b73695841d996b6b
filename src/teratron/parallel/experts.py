"""Expert parallelism: each rank holds some experts of every layer, and token copies travel to them and back (Lepikhin et al. 2020).

The expert axis folds over the ranks of a stage that have different tokens, neighbours first. Balance and capacity stay those of whole
sequences, whoever holds their tokens (contract C3).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from teratron.config import ParallelConfig
from teratron.models.moe import Dispatch, Experts, MoE, Places, Router, Routing
from teratron.parallel.apply import cut_part
from teratron.parallel.context import token_places
from teratron.parallel.mesh import Group, Mesh
from teratron.parallel.twins import share_of


class SequenceRouter(Router):
    """A router whose rank sees a share of each sequence: counts are joined over the ranks that have the rest."""

    def __init__(self, leaf: Router, mesh: Mesh, parallel: ParallelConfig) -> None:
        super().__init__(leaf.config)
        self.pieces = leaf.pieces
        self.balanced, self.context = parallel.context_method == "ring", mesh.context.size
        self.group = mesh.group("context", "tensor") if parallel.sequence else mesh.context
        self.slices = mesh.tensor if parallel.sequence else mesh.group()

    def forward(self, x_BSH: Tensor, real_BS: Tensor | None, dropless: bool) -> Routing:
        return super().forward(x_BSH, None if real_BS is None else share_of(real_BS, self.slices), dropless)

    def whole(self, here_BE: Tensor) -> Tensor:
        whole_BE = here_BE.clone()
        self.group.sum(whole_BE).wait()
        return whole_BE

    def before(self, asked_BSE: Tensor) -> Tensor:
        """Choices by earlier tokens that other ranks have, [B, S, E]."""
        shares = asked_BSE.new_empty(self.group.size, *asked_BSE.shape)
        self.group.gather(shares, asked_BSE.contiguous()).wait()
        whole = asked_BSE.new_empty(asked_BSE.shape[0], asked_BSE.shape[1] * self.group.size, asked_BSE.shape[2])
        for rank, share in enumerate(shares):
            whole[:, self.places(rank, whole.shape[1])] = share
        earlier = (whole.cumsum(1) - whole)[:, self.places(self.group.rank, whole.shape[1])]
        return earlier - (asked_BSE.cumsum(1) - asked_BSE)

    def places(self, rank: int, length: int) -> Tensor:
        """The places in the sequence that a rank of the group holds."""
        slices = self.slices.size
        of_context = token_places(length, self.context, rank // slices, self.balanced and self.context > 1)
        return of_context.view(slices, -1)[rank % slices]


class ExpertDispatch(Dispatch):
    """Sends token copies to the ranks of their experts, which compute them, and mixes what comes back."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def compute(self, rows_RH: Tensor, place: Places, experts: Experts) -> Tensor:
        """Rows in the order of all experts, through the experts wherever they are; rows that are dropped come back as zeros."""
        ranks, count = self.group.size, experts.count
        sizes = place.ends_E.long().diff(prepend=place.ends_E.new_zeros(1).long())
        arriving = torch.empty_like(sizes)
        self.group.exchange(arriving, sizes).wait()  # [from rank, local expert]
        sent, came = self.read_shares(sizes.view(ranks, count).sum(1), arriving.view(ranks, count).sum(1), len(rows_RH))
        received = _RowExchange.apply(rows_RH[: sum(sent)], self.group, sent, came)
        numbers = torch.arange(count, device=sizes.device).repeat(ranks).repeat_interleave(arriving, output_size=sum(came))
        order = numbers.sort(stable=True).indices
        ends = arriving.view(ranks, count).sum(0).cumsum(0).int()
        computed = experts(received[order], ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        returned = _RowExchange.apply(computed[back], self.group, came, sent)
        return torch.cat([returned, rows_RH.new_zeros(len(rows_RH) - len(returned), returned.shape[1])])

    def read_shares(self, sent: Tensor, came: Tensor, rows: int) -> tuple[list[int], list[int]]:
        """How many of `rows` rows go to each rank, and how many come, on the host. A dry run puts an estimate in place of this."""
        return sent.tolist(), came.tolist()

    def total(self, experts: Experts) -> int:
        return experts.count * self.group.size


class _RowExchange(torch.autograd.Function):
    """All-to-all of rows: so many to each rank, so many from each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sent: list[int], came: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.came = group, sent, came
        return _exchange_rows(x, group, sent, came)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(upstream[0], ctx.group, ctx.came, ctx.sent), None, None, None


def _exchange_rows(x: Tensor, group: Group, sent: list[int], came: list[int]) -> Tensor:
    out = x.new_empty(sum(came), x.shape[1])
    group.exchange(out, x.contiguous(), came, sent).wait()
    return out


def apply_experts(model: nn.Module, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Replace the routers and dispatches of a model on the meta device, and leave of every layer's experts this rank's share."""
    group = mesh.experts(parallel.expert, parallel.sequence)
    for mixture in (module for module in model.modules() if isinstance(module, MoE)):
        if mesh.context.size > 1 or parallel.sequence:
            with torch.device("meta"):
                mixture.router = SequenceRouter(mixture.router, mesh, parallel).to(mixture.router.weight.dtype)
        if group.size > 1:
            mixture.dispatch = ExpertDispatch(group)
        _cut_experts(mixture.experts, group, 1 if parallel.sequence else mesh.tensor.size, mesh.tensor.rank)


def _cut_experts(leaf: Experts, group: Group, copies: int, place: int) -> None:
    """copies: tensor ranks that hold the same experts and see the same tokens; place: this one among them."""
    first = copies == 1 or place == 0
    pieces = [cut_part(part, 0, group, 1, even=True) for part in leaf.leaf_parts()]
    leaf.pieces = [replace(piece, copies=copies, first=first) for piece in pieces]
    for piece in pieces:
        old = getattr(leaf, piece.parameter)
        setattr(leaf, piece.parameter, nn.Parameter(torch.empty(piece.size, dtype=old.dtype, device="meta")))
