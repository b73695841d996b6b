"""Prefix language modelling (Liu et al. 2018; Raffel et al. 2020): a text goes on, its beginning seen from both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teratron.data.special import SpecialTokens
from teratron.objectives.corruption import Draw, Pair
from teratron.objectives.rewriting import Rewriting, Sizes


class PrefixLM(Rewriting):
    """Where the text is cut is drawn evenly from all places."""

    name = "prefix"
    ends = False

    def sizes(self, raw: int) -> Sequence[Sizes]:
        return [Sizes(1, raw - 1)]

    def pair(self, tokens: np.ndarray, special: SpecialTokens, draw: Draw) -> Pair:
        return cut(tokens, 1 + int(draw("cut", 1)[0] * (len(tokens) - 1)))


def cut(tokens: np.ndarray, place: int) -> Pair:
    """What comes before a place, and the rest."""
    return tokens[:place], tokens[place:]
