"""Low-rank adapters beside the products of linear layers (LoRA, Hu et al. 2022; DoRA, Liu et al. 2024).

Shape letters: `leaves.py`; here also I: inputs, O: outputs, R: the rank times the parts that are adapted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.leaves import Linear, Part, accurate
from teratron.models.products import linear

SUFFIXES = (".lora_a", ".lora_b", ".magnitude")
"""Of the names of an adapter's parts."""


def adapt(model: nn.Module, config: ModelConfig) -> None:
    """Put adapters beside the linear layers of a model's blocks that `model.adapter_targets` names."""
    for path, leaf in model.named_modules():
        if isinstance(leaf, Linear):
            own = path.rpartition(".")[2]
            names = [name for name in leaf.widths if (name or own) in config.adapter_targets]
            if names:
                leaf.adapter = Adapter(
                    leaf.weight.shape[1], leaf.widths, names, config.adapter_rank, config.adapter_scale, config.adapter_dora
                )


class Adapter(nn.Module):
    """Adds s (x A^T) B^T to a product x W^T. Parts of a fused leaf have an A and a B each, of which the A are one product.

    With `dora` the rows of W + s B A have learnt lengths, the magnitudes; their own lengths are constants to gradients, as in the paper.
    """

    def __init__(self, inputs: int, widths: Mapping[str, int], names: Sequence[str], rank: int, scale: float, dora: bool) -> None:
        """widths: of all of the leaf's parts; names: of those that are adapted."""
        super().__init__()
        self.widths, self.names, self.rank, self.scale = dict(widths), tuple(names), rank, scale
        outputs = sum(self.rows)
        self.a = nn.Parameter(torch.empty(len(names) * rank, inputs))
        self.b = nn.Parameter(torch.empty(outputs, rank))
        self.magnitude = nn.Parameter(torch.empty(outputs)) if dora else None

    @property
    def rows(self) -> list[int]:
        """Outputs of each adapted part."""
        return [self.widths[name] for name in self.names]

    def cut(self, inputs: int, widths: Mapping[str, int]) -> Adapter:
        """One for some of the inputs or outputs."""
        return Adapter(inputs, widths, self.names, self.rank, self.scale, self.magnitude is not None)

    def inner(self, x_BSI: Tensor) -> Tensor:
        """x A^T, [B, S, R]."""
        return linear(x_BSI, self.a)

    def added(self, y_BSO: Tensor, inner_BSR: Tensor) -> Tensor:
        """A product with what is added to it."""
        pieces = dict(zip(self.widths, y_BSO.split(list(self.widths.values()), dim=-1), strict=True))
        for name, inner, b in zip(self.names, (inner_BSR * self.scale).split(self.rank, dim=-1), self.b.split(self.rows), strict=True):
            pieces[name] = pieces[name] + linear(inner, b)
        return _side_by_side(pieces)

    def scaled(self, y_BSO: Tensor, weight_OI: Tensor, join: Callable[[Tensor], None] | None = None) -> Tensor:
        """The sum of both with rows of the learnt lengths. join: adds up squares, in place, where others hold more of the inputs."""
        if self.magnitude is None:
            return y_BSO
        gains = {name: torch.ones(width, dtype=self.magnitude.dtype, device=y_BSO.device) for name, width in self.widths.items()}
        gain = self.magnitude / self.lengths(weight_OI, join)
        gains |= dict(zip(self.names, gain.split(self.rows), strict=True))
        return y_BSO * _side_by_side(gains).to(y_BSO.dtype)

    @torch.no_grad()
    def lengths(self, weight_OI: Tensor, join: Callable[[Tensor], None] | None = None) -> Tensor:
        """Of the rows of W + s B A, without making that matrix; of the adapted parts alone."""
        exact, found = accurate(weight_OI.dtype), []
        weights = dict(zip(self.widths, weight_OI.split(list(self.widths.values())), strict=True))
        for name, a, b in zip(self.names, self.a.split(self.rank), self.b.split(self.rows), strict=True):
            weight, b = weights[name], b.to(exact)
            both, own = (weight @ a.t()).to(exact), (a @ a.t()).to(exact)
            more = ((2 * self.scale * both + self.scale**2 * (b @ own)) * b).sum(1)
            found.append(torch.linalg.vector_norm(weight, dim=1, dtype=exact).square() + more)
        squares = torch.cat(found)
        if join is not None:
            join(squares)
        return squares.sqrt()

    def parts(self, name: str, weight: Part) -> Iterator[Part]:
        """Those beside one of the leaf's weights."""
        if name not in self.names:
            return
        number, inputs = self.names.index(name), weight.shape[1]
        start = sum(self.rows[:number])
        # The uniform values of the paper's own code have this deviation.
        yield Part(f"{name}.lora_a", "adapter.a", number * self.rank, (self.rank, inputs), 1 / math.sqrt(3 * inputs), inner=True)
        yield Part(f"{name}.lora_b", "adapter.b", start, (self.widths[name], self.rank), None, inner=True)
        if self.magnitude is not None:
            yield Part(f"{name}.magnitude", "adapter.magnitude", start, (self.widths[name],), None, lengths_of=weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        """Moves and casts; magnitudes are never of a half type, which would scale whole rows by its rounding."""
        before = self.magnitude.data if self.magnitude is not None else None
        super()._apply(fn, recurse)
        if self.magnitude is not None and before is not None and self.magnitude.dtype != accurate(self.magnitude.dtype):
            self.magnitude.data = before.to(self.magnitude.device, accurate(self.magnitude.dtype))
        return self


def _side_by_side(pieces: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(pieces.values()), dim=-1) if len(pieces) > 1 else next(iter(pieces.values()))
