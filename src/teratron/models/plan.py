"""Plans: how a model may be cut, as a table beside it that `parallel/` applies to its leaves (contracts C5 to C7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Layout(Enum):
    """How activations lie over the tensor ranks at a leaf's boundary."""

    WHOLE = "whole"
    """The same on every rank: tokens, positions."""
    RESIDUAL = "residual"
    """The residual stream: the same on every rank, or with `parallel.sequence` each rank has its share of the sequence."""
    FEATURES = "features"
    """Each rank has its heads, or its share of the last dimension."""
    EXPERTS = "experts"
    """Each rank has the token copies of its experts."""


@dataclass(frozen=True)
class Cut:
    """One row of a plan: what enters and leaves a leaf, and which dimension of its parameters the tensor axis cuts.

    A parameter that is not cut lies on every rank; where the leaf's activations are cut, each has a share of its gradient.
    """

    inputs: Layout
    outputs: Layout
    tensor: Mapping[str, int] = field(default_factory=dict)
    """Parameter name -> dimension; fused parts are cut one by one."""
    expert: Mapping[str, int] = field(default_factory=dict)
    """Parameter name -> dimension that the expert axis cuts."""
    shareable: tuple[str, ...] = ()
    """Fused parts of which several ranks may hold the same heads, when there are fewer heads than ranks."""


Plan = Mapping[str, Cut]
"""Leaf path, with `*` for a layer's number -> its cut."""

_W, _R, _F, _E = Layout.WHOLE, Layout.RESIDUAL, Layout.FEATURES, Layout.EXPERTS

COLUMNS = {"weight": 0, "bias": 0, "adapter.b": 0, "adapter.magnitude": 0}
"""What is cut of a linear layer whose outputs are; the adapter's A lies on every rank."""
ROWS = {"weight": 1, "adapter.a": 1}
"""The same of one whose inputs are; its bias, and the adapter's B and magnitudes, lie on every rank."""

RESIDUAL_NORM = Cut(_R, _R)
EMBEDDING: Plan = {
    "tokens": Cut(_W, _R, {"weight": 0}),
    "positions": Cut(_W, _R),
    "waves": Cut(_W, _R),
    "types": Cut(_W, _R),
    "relative": Cut(_W, _F, {"weight": 1}),
    "norm": RESIDUAL_NORM,
    "dropout": Cut(_R, _R),
}
ATTENTION: Plan = {
    "qkv": Cut(_R, _F, COLUMNS, shareable=("k", "v")),
    "q": Cut(_R, _F, COLUMNS),
    "kv": Cut(_R, _F, COLUMNS, shareable=("k", "v")),
    "q_norm": Cut(_F, _F),
    "k_norm": Cut(_F, _F),
    "q_down": Cut(_R, _R),
    "q_down_norm": RESIDUAL_NORM,
    "q_up": Cut(_R, _F, {"weight": 0}),
    "kv_down": Cut(_R, _R),
    "kv_down_norm": RESIDUAL_NORM,
    "kv_up": Cut(_R, _F, {"weight": 0}),
    "spread": Cut(_R, _F),
    "core": Cut(_F, _F),
    "output": Cut(_F, _R, ROWS),
}
FEED_FORWARD: Plan = {
    "up": Cut(_R, _F, COLUMNS),
    "down": Cut(_F, _R, ROWS),
}
MIXTURE: Plan = {
    "router": Cut(_R, _R),
    "dispatch": Cut(_R, _R),
    "experts": Cut(_E, _E, expert={"gate": 0, "up": 0, "down": 0}),
    "shared.up": FEED_FORWARD["up"],
    "shared.down": FEED_FORWARD["down"],
}
HEAD: Plan = {
    "norm": RESIDUAL_NORM,
    "transform": Cut(_R, _R),
    "transform_norm": RESIDUAL_NORM,
    "pooler": Cut(_R, _R),
    "sentence": Cut(_R, _W),
    "classes": Cut(_R, _W),
    "output": Cut(_R, _W, {"weight": 0, "bias": 0}),
}


def under(path: str, plan: Plan) -> dict[str, Cut]:
    """The same rows below a path."""
    return {f"{path}.{leaf}": cut for leaf, cut in plan.items()}


def block_plan(path: str, cross: bool = False) -> dict[str, Cut]:
    """A block's rows: self-attention, with `cross` attention to the encoder's memory, feed-forward or a mixture of experts."""
    rows: dict[str, Cut] = {}
    for name in ("attention", "cross_attention") if cross else ("attention",):
        rows |= under(f"{path}.{name}", ATTENTION)
    for name in ("attention", "cross_attention", "ffn") if cross else ("attention", "ffn"):
        rows |= {f"{path}.{name}_{norm}": RESIDUAL_NORM for norm in ("norm", "output_norm")} | {f"{path}.{name}_dropout": Cut(_R, _R)}
    return rows | under(f"{path}.ffn", FEED_FORWARD) | under(f"{path}.ffn", MIXTURE)
