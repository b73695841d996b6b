"""The contrastive term where a sequence's tokens are cut over ranks: each compares its own with all."""

from __future__ import annotations

from torch import Tensor

from teratron.config import ParallelConfig
from teratron.models import Model
from teratron.models.contrast import TokenContrast
from teratron.parallel.collectives import gather_sequence
from teratron.parallel.mesh import Mesh
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


def apply_contrast(model: Model, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Replace the contrast of a model's head, where it is here and sees a share of the tokens only."""
    if model.head is not None and (mesh.context.size > 1 or parallel.sequence):
        model.head.contrast = SharedContrast(mesh, parallel.sequence)
