"""The leaf modules that every family is made of; `parallel/` replaces leaves by their parallel twins (contract C6).

Shapes are named by suffix letters: B batch, S sequence, H hidden, N query heads, K key/value heads, D head dimension,
F feed-forward, V vocabulary, T tokens. A fused leaf holds several parts in adjacent rows (contract C7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.products import EXACT, Later, Products, linear
from teratron.models.random import feature_keys, keep_mask, seed_of

if TYPE_CHECKING:
    from teratron.models.adapters import Adapter


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
    lengths_of: Part | None = None
    """The matrix whose rows' lengths are its initial values, in place of these."""
    offset: tuple[int, ...] = ()
    """Where in the full shape the piece that is held here begins; empty = at its beginning."""
    size: tuple[int, ...] = ()
    """Shape of the piece that is held here; empty = the full shape."""
    copies: int = 1
    """Neighbouring ranks of the tensor axis that hold this very piece."""
    partial: bool = False
    """Whether each copy has only a share of the gradient, which is their sum."""
    first: bool = True
    """Whether this is the first of the copies."""
    holders: int = 1
    """Pipeline stages' ranks that hold it, each with a share of the gradient."""
    inner: bool = False
    """Whether this is a matrix between features, or several: no table, no vector."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", self.offset or (0,) * len(self.shape))
        object.__setattr__(self, "size", self.size or self.shape)

    def box(self) -> tuple[slice, ...]:
        """The index that takes the piece that is held here out of the full tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))

    def of(self, tensor: Tensor) -> Tensor:
        """This part's view of a tensor shaped like its parameter."""
        return tensor[self.start : self.start + self.size[0]]


class Leaf(nn.Module):
    """A module with parameters of its own."""

    pieces: list[Part] | None = None
    """The parts as they are cut here; None = whole."""

    def leaf_parts(self) -> Iterator[Part]:
        """The whole parts."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """What this leaf holds."""
        return self.pieces if self.pieces is not None else list(self.leaf_parts())


class Linear(Leaf):
    """y = x W^T + b. `outputs` is a width, or named widths of parts that are computed in one product.

    granule: outputs that are never cut apart, such as the features of one head.
    """

    products: Products = EXACT
    """How its matrix products are computed."""
    later: Later | None = None
    """Where weight gradients may wait."""

    def __init__(
        self, inputs: int, outputs: int | Mapping[str, int], bias: bool, std: float | Mapping[str, float], granule: int = 1
    ) -> None:
        """std: of the initial weights, one for all parts or by their names."""
        super().__init__()
        self.widths = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        self.std, self.granule = std, granule
        self.weight = nn.Parameter(torch.empty(sum(self.widths.values()), inputs))
        self.bias = nn.Parameter(torch.empty(sum(self.widths.values()))) if bias else None
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return linear(x, self.weight, self.bias, self)
        return self.adapted(linear(x, self.weight, None, self), self.adapter.inner(x), self.adapter)

    def adapted(self, y: Tensor, inner: Tensor, adapter: Adapter) -> Tensor:
        """What the leaf gives, from its own product and the adapter's first one."""
        y = adapter.scaled(adapter.added(y, inner), self.weight)
        return y if self.bias is None else y + self.bias

    def leaf_parts(self) -> Iterator[Part]:
        start = 0
        for name, width in self.widths.items():
            std = self.std[name] if isinstance(self.std, Mapping) else self.std
            weight = Part(f"{name}.weight", "weight", start, (width, self.weight.shape[1]), std, inner=True)
            yield weight
            if self.bias is not None:
                yield Part(f"{name}.bias", "bias", start, (width,), None)
            if self.adapter is not None:
                yield from self.adapter.parts(name, weight)
            start += width


class Embedding(Leaf):
    """A table of `count` rows, padded in memory to a multiple of `multiple`; the padding is no part and never looked up."""

    def __init__(self, count: int, width: int, std: float, multiple: int = 1, name: str = ".weight") -> None:
        """name: of the part; a table apart from the one that it is tied to holds a copy under that one's name (contract C9)."""
        super().__init__()
        self.count, self.std, self.multiple, self.name = count, std, multiple, name
        self.weight = nn.Parameter(torch.empty(-(-count // multiple) * multiple, width))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)

    def leaf_parts(self) -> Iterator[Part]:
        yield Part(self.name, "weight", 0, (self.count, self.weight.shape[1]), self.std)


class Norm(Leaf):
    """LayerNorm or RMSNorm over the last dimension; statistics in float32 for half types."""

    def __init__(self, width: int, kind: str, bias: bool, eps: float, less_one: bool = False) -> None:
        """less_one: the weight is kept less 1."""
        super().__init__()
        self.kind, self.eps, self.less_one = kind, eps, less_one
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias and kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.less_one:
            exact = accurate(x.dtype)
            return self._normalised(x.to(exact), self.weight.to(exact) + 1).to(x.dtype)
        return self._normalised(x, self.weight)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return F.layer_norm(x, weight.shape, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def leaf_parts(self) -> Iterator[Part]:
        yield Part(".weight", "weight", 0, tuple(self.weight.shape), None, fill=0.0 if self.less_one else 1.0)
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
