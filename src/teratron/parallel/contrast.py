"""The contrastive term where a sequence's tokens are cut over ranks: each compares its own with all."""

from __future__ import annotations

import torch
from torch import Tensor

from teratron.config import ParallelConfig
from teratron.models import Model
from teratron.models.contrast import TokenContrast
from teratron.models.join import Join
from teratron.parallel.collectives import gather_sequence, leave
from teratron.parallel.mesh import Group, Mesh
from teratron.parallel.twins import share_of


class SharedContrast(TokenContrast):
    """Gathers the normalised states of all tokens; their gradients need no collective, since those of a pair are alike."""

    def __init__(self, mesh: Mesh, sequence: bool) -> None:
        """sequence: tensor ranks, too, have shares of the tokens."""
        super().__init__()
        self.group = mesh.group("context", "tensor") if sequence else mesh.context
        self.slices = mesh.tensor if sequence else mesh.group()
        self.place = self.group.rank

    def forward(self, hidden_BSH: Tensor, weights_BS: Tensor, segments_BS: Tensor | None, margin: float) -> Tensor:
        segments = None if segments_BS is None else share_of(segments_BS, self.slices)
        return super().forward(hidden_BSH, share_of(weights_BS, self.slices), segments, margin)

    def every(self, x_BS: Tensor) -> Tensor:
        return gather_sequence(x_BS, self.group)

    def total(self, x: Tensor) -> Tensor:
        self.slices.sum(x).wait()
        return x


class SequenceJoin(Join):
    """Tensor ranks have shares of the tokens."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def share(self, x_BS: Tensor) -> Tensor:
        return share_of(x_BS, self.group)

    def total(self, x: Tensor) -> Tensor:
        return leave(x, self.group, False)

    def every(self, x_BSC: Tensor) -> Tensor:
        before, behind = self.group.rank * x_BSC.shape[1], (self.group.size - self.group.rank - 1) * x_BSC.shape[1]
        return self.total(torch.nn.functional.pad(x_BSC, (0, 0, before, behind)))  # few features: cheaper than another collective's code


def apply_contrast(model: Model, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Replace what compares tokens in a model's head, where it is here and sees a share of the tokens only."""
    if model.head is None:
        return
    if mesh.context.size > 1 or parallel.sequence:
        model.head.contrast = SharedContrast(mesh, parallel.sequence)
    if parallel.sequence:
        model.head.join = SequenceJoin(mesh.tensor)
