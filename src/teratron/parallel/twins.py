"""The parallel twins of leaves: the same mathematics on this rank's share of the weights, collectives at the boundary (contract C6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.models.blockwise import capped
from teratron.models.head import LanguageHead, Vocabulary
from teratron.models.latent import Spread
from teratron.models.leaves import Dropout, Embedding, Linear, Part
from teratron.models.positions import Waves
from teratron.models.products import linear
from teratron.parallel.collectives import column_product, enter, leave
from teratron.parallel.mesh import Group, Pending


class ColumnLinear(Linear):
    """Holds some of the outputs: from the residual stream to features."""

    def __init__(self, leaf: Linear, pieces: list[Part], group: Group, sequence: bool) -> None:
        widths = {name: _held(pieces, f"{name}.weight") for name in leaf.widths}
        super().__init__(leaf.weight.shape[1], widths, leaf.bias is not None, leaf.std, leaf.granule)
        self.pieces, self.group, self.sequence = pieces, group, sequence
        self.adapter = leaf.adapter and leaf.adapter.cut(leaf.weight.shape[1], widths)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.adapter is None else None
        y, inner = column_product(x, self, bias, self.group, self.sequence)
        return y if self.adapter is None else self.adapted(y, inner, self.adapter)


class RowLinear(Linear):
    """Holds some of the inputs: from features to the residual stream. The bias is added once, after the sum."""

    def __init__(self, leaf: Linear, pieces: list[Part], group: Group, sequence: bool) -> None:
        super().__init__(pieces[0].size[1], leaf.widths, leaf.bias is not None, leaf.std, leaf.granule)
        self.pieces, self.group, self.sequence = pieces, group, sequence
        self.adapter = leaf.adapter and leaf.adapter.cut(pieces[0].size[1], leaf.widths)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, None, self)
        if self.adapter is not None:
            y = self.adapter.added(y, self.adapter.inner(x))
        y = leave(y, self.group, self.sequence)
        if self.adapter is not None:
            y = self.adapter.scaled(y, self.weight, _in_place(self.group.sum))
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(Embedding):
    """Holds some rows of the table; a token that is not among them adds nothing to the sum."""

    def __init__(self, leaf: Embedding, pieces: list[Part], group: Group, sequence: bool) -> None:
        super().__init__(most_rows(pieces[0], group), leaf.weight.shape[1], leaf.std, leaf.multiple, leaf.name)
        self.pieces, self.group, self.sequence = pieces, group, sequence
        self.first, self.count = pieces[0].offset[0], pieces[0].size[0]

    def forward(self, index: Tensor) -> Tensor:
        place = index - self.first
        here = (place >= 0) & (place < self.count)
        rows = F.embedding(place.clamp(0, self.count - 1), self.weight) * here.unsqueeze(-1)
        return leave(rows, self.group, self.sequence)


class SequenceEmbedding(Embedding):
    """Looks up this rank's share of the sequence in a table that every rank has."""

    def __init__(self, leaf: Embedding, pieces: list[Part], group: Group) -> None:
        super().__init__(leaf.count, leaf.weight.shape[1], leaf.std, leaf.multiple)
        self.pieces, self.group = pieces, group

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(share_of(index, self.group), self.weight)


class SequenceWaves(Waves):
    """Makes the waves of this rank's share of the sequence."""

    def __init__(self, leaf: Waves, group: Group) -> None:
        super().__init__(leaf.width)
        self.group = group

    def forward(self, index_BS: Tensor, dtype: torch.dtype) -> Tensor:
        return super().forward(share_of(index_BS, self.group), dtype)


class TensorSpread(Spread):
    """Hands all tokens' features to every rank, whose heads each have a share of their gradient."""

    def __init__(self, group: Group, sequence: bool) -> None:
        super().__init__()
        self.group, self.sequence = group, sequence

    def forward(self, x_BSF: Tensor) -> Tensor:
        return enter(x_BSF, self.group, self.sequence)


class SequenceDropout(Dropout):
    """Drops features of this rank's share of the sequence."""

    def __init__(self, leaf: Dropout, group: Group) -> None:
        nn.Module.__init__(self)
        self.probability, self.site, self.group = leaf.probability, leaf.site, group

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        return super().forward(x, None if keys is None else share_of(keys, self.group))


class VocabularyHead(LanguageHead):
    """Holds some rows of the output projection; softmax sums are joined over the ranks, logits never are in training."""

    def __init__(
        self, leaf: LanguageHead, held: Part, pieces: list[Part], group: Group, sequence: bool, shared: nn.Parameter | None
    ) -> None:
        """held: the rows of the vocabulary; pieces: of the leaf's own parts."""
        width, bias = leaf.weight.shape[1], leaf.bias is not None
        super().__init__(width, most_rows(held, group), leaf.multiple, leaf.std, shared, leaf.name, bias, leaf.cap)
        self.pieces, self.group, self.sequence = pieces, group, sequence
        self.vocabulary = Vocabulary(held.shape[0], held.offset[0], held.size[0], _in_place(group.sum), _in_place(group.max))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [B, S, V] over the whole vocabulary, joined from all ranks: for generation, without gradients."""
        with torch.no_grad():
            mine = capped(linear(enter(hidden, self.group, self.sequence), self.weight, self.bias), self.cap)
            everyone = mine.new_empty(self.group.size, *mine.shape)
            self.group.gather(everyone, mine.contiguous()).wait()
        total, ranks = self.vocabulary.total, self.group.size
        return torch.cat([everyone[rank][..., : len(even_share(total, ranks, rank))] for rank in range(ranks)], dim=-1)

    def loss_sum(self, hidden: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0, most: int = 0) -> Tensor:
        return super().loss_sum(enter(hidden, self.group, self.sequence), targets, weights, smoothing, most)


class SequenceHead(LanguageHead):
    """Has all classes, for this rank's share of the sequence."""

    def __init__(self, leaf: LanguageHead, pieces: list[Part], group: Group) -> None:
        super().__init__(leaf.weight.shape[1], leaf.vocabulary.total, leaf.multiple, leaf.std, bias=leaf.bias is not None)
        self.pieces, self.group = pieces, group

    def loss_sum(self, hidden: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0, most: int = 0) -> Tensor:
        mine = super().loss_sum(hidden, share_of(targets, self.group), share_of(weights, self.group), smoothing, most)
        return leave(mine, self.group, False)


def even_share(total: int, ranks: int, rank: int) -> range:
    """The rank-th of `ranks` ranges that cover [0, total), their lengths at most one apart."""
    return range(total * rank // ranks, total * (rank + 1) // ranks)


def most_rows(held: Part, group: Group) -> int:
    """Rows of a vocabulary that every rank makes room for. Where it does not divide, ranks whose buckets had different lengths would
    sum the gradients of uncut parameters in different orders over the data ranks, and their copies would drift apart."""
    return -(-held.shape[0] // group.size)


def share_of(x_BS: Tensor, group: Group) -> Tensor:
    """This rank's share of the sequence."""
    length = x_BS.shape[1] // group.size
    return x_BS[:, group.rank * length : (group.rank + 1) * length]


def _held(pieces: list[Part], name: str) -> int:
    """Rows of a part that are held here; `name` as the leaf calls it."""
    return next(piece.size[0] for piece in pieces if piece.name == name)


def _in_place(collective: Callable[[Tensor], Pending]) -> Callable[[Tensor], None]:
    return lambda x: collective(x).wait()
