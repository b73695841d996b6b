"""Applying a plan: every leaf that the tensor axis concerns is replaced by its twin (contract C6). The only reader of plans."""

from __future__ import annotations

import fnmatch
from dataclasses import replace

import torch
from torch import nn

from teratron.config import ModelConfig, UserError
from teratron.models import Model, Part, build_model
from teratron.models.attention import AttentionCore
from teratron.models.head import LanguageHead
from teratron.models.latent import Spread
from teratron.models.leaves import Dropout, Embedding, Leaf, Linear, Norm
from teratron.models.moe import Router
from teratron.models.plan import Cut, Layout, Plan
from teratron.models.positions import Waves
from teratron.models.relative import RelativeTable
from teratron.models.two_stream import HeadBias
from teratron.parallel.mesh import Group, Mesh
from teratron.parallel.twins import (
    ColumnLinear,
    RowLinear,
    SequenceDropout,
    SequenceEmbedding,
    SequenceHead,
    SequenceWaves,
    TensorSpread,
    VocabularyEmbedding,
    VocabularyHead,
    even_share,
)


def cut_model(
    config: ModelConfig, mesh: Mesh, sequence: bool = False, dtype: torch.dtype = torch.float32, units: range | None = None
) -> Model:
    """This rank's share of a model, on the meta device: without memory (see `materialise`, `flatten`)."""
    model = build_model(config, units, "meta", dtype)
    if mesh.tensor.size > 1:
        with torch.device("meta"):
            _Surgeon(model, mesh.tensor, sequence).apply()
        model.to(dtype)
    return model


def materialise(model: Model, device: str | torch.device) -> None:
    """Give every parameter of a model on the meta device memory of its own, filled with zeros; tied ones stay one."""
    replace_parameters(model, {name: torch.zeros_like(p, device=device) for name, p in model.named_parameters()})


def replace_parameters(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Make new parameters of these tensors in the places of the old ones, all places of a shared one."""
    fresh = {id(parameter): nn.Parameter(values[name], parameter.requires_grad) for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, fresh[id(parameter)])


class _Surgeon:
    """Replaces the leaves of one model."""

    def __init__(self, model: Model, group: Group, sequence: bool) -> None:
        self.model, self.group, self.sequence = model, group, sequence
        self.tables: dict[int, nn.Parameter] = {}
        """Tables of tokens by the identity of what they were before, for the heads that are tied to them."""

    def apply(self) -> None:
        leaves = (Leaf, Dropout, AttentionCore, Spread, Waves)
        for path, leaf in [(path, module) for path, module in self.model.named_modules() if isinstance(module, leaves)]:
            twin = self.twin(leaf, find_cut(self.model.plan, path))
            if twin is not leaf:
                self.put(leaf, twin)

    def put(self, leaf: nn.Module, twin: nn.Module) -> None:
        """In every place where the leaf stands."""
        for module in self.model.modules():
            for name, child in module._modules.items():
                if child is leaf:
                    setattr(module, name, twin)

    def twin(self, leaf: nn.Module, cut: Cut) -> nn.Module:
        if isinstance(leaf, Linear) and cut.tensor:
            if cut.inputs is Layout.FEATURES:
                return RowLinear(leaf, self.pieces(leaf, cut), self.group, self.sequence)
            return ColumnLinear(leaf, self.pieces(leaf, cut), self.group, self.sequence and cut.inputs is Layout.RESIDUAL)
        if isinstance(leaf, LanguageHead) and cut.tensor:
            return self.head(leaf, cut)
        if isinstance(leaf, LanguageHead) and self.sequence:
            return SequenceHead(leaf, self.pieces(leaf, cut), self.group)
        if isinstance(leaf, RelativeTable):
            return self.relative(leaf, self.pieces(leaf, cut))
        if isinstance(leaf, Embedding) and cut.tensor:
            twin = VocabularyEmbedding(leaf, self.pieces(leaf, cut), self.group, self.sequence)
            self.tables[id(leaf.weight)] = twin.weight
            return twin
        if isinstance(leaf, Embedding) and self.sequence:
            return SequenceEmbedding(leaf, self.pieces(leaf, cut), self.group)
        if isinstance(leaf, Dropout) and self.sequence and cut.inputs is Layout.RESIDUAL:
            return SequenceDropout(leaf, self.group)
        if isinstance(leaf, HeadBias):
            leaf.hold(self.pieces(leaf, cut))
        if isinstance(leaf, Waves) and self.sequence:
            return SequenceWaves(leaf, self.group)
        if isinstance(leaf, Spread):
            return TensorSpread(self.group, self.sequence)
        if isinstance(leaf, AttentionCore):
            leaf.place, leaf.shares = self.group.rank, self.group.size
        if isinstance(leaf, (Norm, Embedding, Router, Linear, LanguageHead)):
            leaf.pieces = self.pieces(leaf, cut)
        return leaf

    def relative(self, leaf: RelativeTable, pieces: list[Part]) -> RelativeTable:
        """The columns of this rank's heads."""
        twin = RelativeTable(leaf.count, pieces[0].size[1], leaf.std)
        twin.pieces = pieces
        return twin

    def head(self, leaf: LanguageHead, cut: Cut) -> nn.Module:
        whole = Part(leaf.name, "weight", 0, (leaf.vocabulary.total, leaf.weight.shape[1]), leaf.std)
        held, shared = cut_part(whole, 0, self.group, 1), self.tables.get(id(leaf.weight))
        return VocabularyHead(leaf, held, self.pieces(leaf, cut), self.group, self.sequence, shared)

    def pieces(self, leaf: Leaf, cut: Cut) -> list[Part]:
        """What this rank holds of a leaf's parts."""
        partial = cut.inputs is Layout.FEATURES or (self.sequence and Layout.RESIDUAL in (cut.inputs, cut.outputs))
        if isinstance(leaf, Linear) and cut.inputs is Layout.FEATURES:
            partial = self.sequence  # what is left uncut is the bias, which is added to the residual stream
        start: dict[str, int] = {}
        found = []
        for part in leaf.leaf_parts():
            dimension = cut.tensor.get(part.parameter)
            if dimension is None:
                shared = partial or (bool(cut.tensor) and part.parameter in ("adapter.a", "adapter.b"))  # what is between them is cut
                piece = replace(part, copies=self.group.size, partial=shared, first=self.group.rank == 0)
            else:
                shareable = part.name.partition(".")[0] in cut.shareable
                granule = leaf.granule if isinstance(leaf, (Linear, HeadBias)) else 1
                piece = cut_part(part, dimension, self.group, granule, shareable, even=isinstance(leaf, Linear))
            begin = start.get(part.parameter, 0)
            start[part.parameter] = begin + piece.size[0]
            found.append(replace(piece, start=begin))
        return found


def find_cut(plan: Plan, path: str) -> Cut:
    """The plan's row of a leaf."""
    for pattern, cut in plan.items():
        if fnmatch.fnmatchcase(path, pattern) and path.count(".") == pattern.count("."):
            return cut
    raise KeyError(f"the plan has no row for {path}")


def cut_part(part: Part, dimension: int, group: Group, granule: int, shareable: bool = False, even: bool = False) -> Part:
    """This rank's piece of a part that the ranks of a group share along a dimension, in multiples of `granule`.

    With `shareable`, fewer multiples than ranks are held by several ranks each. Raises `UserError` for what does not divide.
    """
    count, ranks, rank = part.shape[dimension] // granule, group.size, group.rank
    copies = ranks // count if shareable and count < ranks else 1
    if count % (ranks // copies) if even else count < ranks:
        raise UserError(f"parallel.tensor = {ranks}: {part.name} has {count} pieces along dimension {dimension}: choose a divisor of it")
    mine = even_share(count, ranks // copies, rank // copies)
    offset, size = list(part.offset), list(part.size)
    offset[dimension], size[dimension] = mine.start * granule, len(mine) * granule
    return replace(part, offset=tuple(offset), size=tuple(size), copies=copies, partial=copies > 1, first=rank % copies == 0)
