"""Collectives that gradients pass through: the f and g of Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022).

Activations are [B, S, ...]; with `sequence` the residual stream is [B, S / ranks, ...] on each rank. torch.compile leaves these
functions alone: what it compiles are the segments between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teratron.models.leaves import Linear
from teratron.models.products import EXACT
from teratron.parallel.mesh import Group, Pending


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """The whole sequence [B, S, ...] from every rank's share [B, S / ranks, ...]."""
    whole, pending = _start_gather(x, group)
    pending.wait()
    return whole


def _start_gather(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    whole = x.new_empty(x.shape[0], group.size * x.shape[1], *x.shape[2:])
    return whole, group.gather(_by_rank(whole, group), x.contiguous())


def _start_scatter_sum(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """This rank's share of the sequence, summed over the ranks."""
    parts = _by_rank(x, group)
    share = x.new_empty(parts.shape[1:])
    return share, group.scatter_sum(share, parts)


def _by_rank(x: Tensor, group: Group) -> Tensor:
    """The whole sequence [B, S, ...] seen as [ranks, B, S / ranks, ...]."""
    return x.unflatten(1, (group.size, -1)).movedim(1, 0)


class _Enter(torch.autograd.Function):
    """f: from the residual stream into a region where each rank makes a share of what follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sequence: bool) -> Tensor:
        ctx.group, ctx.sequence = group, sequence
        return gather_sequence(x, group) if sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return _reduce(upstream[0], ctx.group, ctx.sequence), None, None


class _Leave(torch.autograd.Function):
    """g: from partial sums back to the residual stream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sequence: bool) -> Tensor:
        ctx.group, ctx.sequence = group, sequence
        return _reduce(x, group, sequence)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return gather_sequence(upstream[0], ctx.group) if ctx.sequence else upstream[0], None, None


def _reduce(x: Tensor, group: Group, sequence: bool) -> Tensor:
    if sequence:
        share, pending = _start_scatter_sum(x, group)
    else:
        share = torch.empty_like(x, memory_format=torch.contiguous_format)
        pending = group.sum(x, share)
    pending.wait()
    return share


class _ColumnProduct(torch.autograd.Function):
    """x W^T + b and x A^T behind f; backward overlaps the collectives with the products, and keeps only this rank's share of x.

    A, of an adapter, may be absent. What needs no gradient costs nothing in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, leaf: Linear, group: Group, sequence: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None)
        ctx.group, ctx.sequence = group, sequence
        ctx.weight, ctx.bias, ctx.a, ctx.leaf = weight, bias, a, leaf
        whole = gather_sequence(x, group) if sequence else x
        return leaf.products.forward(whole, weight, bias), None if a is None else EXACT.forward(whole, a, None)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,), leaf, group, sequence = ctx.saved_tensors, ctx.leaf, ctx.group, ctx.sequence
        slope, of_inner = upstream[0].contiguous(), upstream[1]
        needs_x, needs_weight, needs_bias, needs_a = ctx.needs_input_grad[:4]
        waits = leaf.later is not None and leaf.later.active and (needs_weight or needs_bias)
        gathered = _start_gather(x, group) if sequence and (needs_a or (needs_weight and not waits)) else None
        share, pending = None, None
        if needs_x:
            below = leaf.products.of_inputs(slope, ctx.weight)
            below = below if ctx.a is None else below + EXACT.of_inputs(of_inner, ctx.a)
            share, pending = _start_reduction(below, group, sequence, gathered)
        elif gathered is not None:
            gathered[1].wait()
        whole = gathered[0] if gathered is not None else x
        if waits:
            leaf.later.put_off(leaf, ctx.bias, slope, lambda: gather_sequence(x, group) if sequence else x)
        of_weight = leaf.products.of_weight(slope, whole) if needs_weight and not waits else None
        of_bias = slope.flatten(0, -2).sum(0) if needs_bias and not waits else None
        of_a = EXACT.of_weight(of_inner, whole) if needs_a else None
        if pending is not None:
            pending.wait()
        return share, of_weight, of_bias, of_a, None, None, None


def _start_reduction(x: Tensor, group: Group, sequence: bool, gathered: tuple[Tensor, Pending] | None) -> tuple[Tensor, Pending]:
    """Begin the sum of x over the ranks, once a gather that was begun before is done."""
    if gathered is not None:
        gathered[1].wait()
    return _start_scatter_sum(x, group) if sequence else (x, group.sum(x))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def enter(x: Tensor, group: Group, sequence: bool) -> Tensor:
    """The residual stream as every rank needs it whole; gradients are summed (and cut again) on the way back."""
    return _Enter.apply(x, group, sequence)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def leave(x: Tensor, group: Group, sequence: bool) -> Tensor:
    """The sum over the ranks, whole or cut along the sequence."""
    return _Leave.apply(x, group, sequence)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def column_product(x: Tensor, leaf: Linear, bias: Tensor | None, group: Group, sequence: bool) -> tuple[Tensor, Tensor]:
    """The product of the residual stream with the rows of a weight that this rank's leaf has, and a bias; the first one of its adapter."""
    a = None if leaf.adapter is None else leaf.adapter.a
    return _ColumnProduct.apply(x, leaf.weight, bias, a, leaf, group, sequence)
