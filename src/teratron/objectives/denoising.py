"""Denoising (BART, Lewis et al. 2020): a corrupted text is read, the whole text is to be written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teratron.config import Config
from teratron.data.special import SpecialTokens
from teratron.objectives.corruption import Draw, Pair, infilling, permuted, thinned
from teratron.objectives.rewriting import Rewriting, Sizes


class Denoising(Rewriting):
    """Text infilling, or tokens masked or deleted; before that, sentences may be put in another order."""

    name = "denoising"

    def __init__(self, config: Config) -> None:
        self.config = config.objective
        super().__init__(config)

    def sizes(self, raw: int) -> Sequence[Sizes]:
        return [Sizes(raw + 1, raw + 1)]

    def roles(self, raw: int) -> Sequence[str]:
        return ("mask",)

    def pair(self, tokens: np.ndarray, special: SpecialTokens, draw: Draw) -> Pair:
        density, how, mask = self.config.noise_density, self.config.corruption, special.ids["mask"]
        read = permuted(tokens, special.sentence_ends[tokens], draw) if self.config.permute_sentences else tokens
        if how == "infilling":
            return infilling(read, density, self.config.mean_span, mask, draw), tokens
        return thinned(read, density, how, mask, draw), tokens
