"""What a loss that compares tokens needs where ranks have shares of a sequence."""

from __future__ import annotations

from torch import Tensor, nn


class Join(nn.Module):
    """Here all tokens are at hand, and there is nothing to join. Has no parameters; its twin is `parallel.contrast.SequenceJoin`."""

    def share(self, x_BS: Tensor) -> Tensor:
        """Of what is known of every token, that of the tokens which are here."""
        return x_BS

    def total(self, x: Tensor) -> Tensor:
        """The sum over those who have other tokens and then compute the same loss; the gradient reaches each."""
        return x

    def every(self, x_BSC: Tensor) -> Tensor:
        """All tokens' features, from those of the tokens that are here."""
        return x_BSC
