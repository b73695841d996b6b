"""UL2 (Tay et al. 2023): a mixture of denoisers, of which a token at the beginning says which kind it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teratron.data.special import SpecialTokens
from teratron.objectives.corruption import Draw, Pair, span_corruption, span_counts
from teratron.objectives.prefix import cut
from teratron.objectives.rewriting import Rewriting, Sizes
from teratron.objectives.span_corruption import sentinel_ids, sentinel_roles

REGULAR, SEQUENTIAL, EXTREME = "[R]", "[S]", "[X]"
SPANS = ((REGULAR, 0.15, 3), (REGULAR, 0.15, 8), (EXTREME, 0.5, 3), (EXTREME, 0.5, 8), (EXTREME, 0.15, 64), (EXTREME, 0.5, 64))
"""Kind, density and mean span of the denoisers that corrupt spans. One more, as often as each of them, goes on with a text."""
LONGEST_END = 0.5
"""Of a text the share that is gone on with at most; a quarter on average."""


class MixtureOfDenoisers(Rewriting):
    """Each sample has one of seven denoisers, all alike likely."""

    name = "ul2"

    def sizes(self, raw: int) -> Sequence[Sizes]:
        found = [Sizes(raw + 1, 2), Sizes(raw - _longest_end(raw) + 2, _longest_end(raw) + 1)]
        for _, density, mean_span in SPANS:
            noise, spans = span_counts(raw, density, mean_span)
            found.append(Sizes(raw - noise + spans + 2, noise + spans + 1))
        return found

    def roles(self, raw: int) -> Sequence[str]:
        most = max(span_counts(raw, density, mean_span)[1] for _, density, mean_span in SPANS)
        return (REGULAR, SEQUENTIAL, EXTREME, *sentinel_roles(most))

    def pair(self, tokens: np.ndarray, special: SpecialTokens, draw: Draw) -> Pair:
        which = int(draw("which", 1)[0] * (len(SPANS) + 1))
        if which < len(SPANS):
            kind, density, mean_span = SPANS[which]
            read, written = span_corruption(tokens, density, mean_span, sentinel_ids(special), draw)
        else:
            kind, end = SEQUENTIAL, 1 + int(draw("cut", 1)[0] * _longest_end(len(tokens)))
            read, written = cut(tokens, len(tokens) - end)
        return np.concatenate(([special.ids[kind]], read)), written


def _longest_end(length: int) -> int:
    return max(1, int(LONGEST_END * length))
