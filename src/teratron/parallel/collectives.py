"""Collectives that gradients pass through: the f and g of Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022).

Activations are [B, S, ...]; with `sequence` the residual stream is [B, S / ranks, ...] on each rank. torch.compile leaves these
functions alone: what it compiles are the segments between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teratron.models.leaves import Linear
from teratron.parallel.mesh import Group, Pending


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """The whole sequence [B, S, ...] from every rank's share [B, S / ranks, ...]."""
    parts, pending = _start_gather(x, group)
    pending.wait()
    return _join(parts)


def _start_gather(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """Every rank's share, [ranks, B, s, ...]."""
    parts = x.new_empty(group.size, *x.shape)
    return parts, group.gather(parts, x.contiguous())


def _join(parts: Tensor) -> Tensor:
    return parts.movedim(0, 1).flatten(1, 2)


def _start_scatter_sum(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """This rank's share of the sequence, summed over the ranks."""
    batch, length = x.shape[:2]
    parts = x.view(batch, group.size, length // group.size, *x.shape[2:]).movedim(1, 0).contiguous()
    share = torch.empty_like(parts[0])
    return share, group.scatter_sum(share, parts)


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
        share = x.clone(memory_format=torch.contiguous_format)
        pending = group.sum(share)
    pending.wait()
    return share


class _ColumnProduct(torch.autograd.Function):
    """x W^T + b behind f; backward overlaps the collectives with the products, and keeps only this rank's share of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Linear, group: Group, sequence: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.group, ctx.sequence = group, sequence
        ctx.weight, ctx.leaf = weight, leaf
        return leaf.products.forward(gather_sequence(x, group) if sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        (x,), leaf = ctx.saved_tensors, ctx.leaf
        slope, group, sequence = upstream[0].contiguous(), ctx.group, ctx.sequence
        waits = leaf.later is not None and leaf.later.active
        gathered = _start_gather(x, group) if sequence and not waits else None
        share, pending = _start_reduction(leaf.products.of_inputs(slope, ctx.weight), group, sequence, gathered)
        if waits:
            leaf.later.put_off(leaf, leaf.bias, slope, lambda: gather_sequence(x, group) if sequence else x)
            pending.wait()
            return share, None, None, None, None, None
        whole = _join(gathered[0]) if gathered is not None else x
        grad_weight = leaf.products.of_weight(slope, whole)
        grad_bias = slope.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        pending.wait()
        return share, grad_weight, grad_bias, None, None, None


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
def column_product(x: Tensor, leaf: Linear, group: Group, sequence: bool) -> Tensor:
    """The product of the residual stream with the rows of a weight that this rank's leaf has, and its bias."""
    return _ColumnProduct.apply(x, leaf.weight, leaf.bias, leaf, group, sequence)
