"""Span corruption (T5, Raffel et al. 2020): spans of the text are left out, and to be written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teratron.config import Config
from teratron.data.special import SpecialTokens
from teratron.objectives.corruption import Draw, Pair, span_corruption, span_counts
from teratron.objectives.rewriting import Rewriting, Sizes


def sentinel_roles(count: int) -> tuple[str, ...]:
    """The tokens that stand for spans, by T5's names."""
    return tuple(f"<extra_id_{number}>" for number in range(count))


def sentinel_ids(special: SpecialTokens) -> np.ndarray:
    """Their ids in order."""
    return np.array([number for role, number in special.ids.items() if role.startswith("<extra_id_")], np.int64)


class SpanCorruption(Rewriting):
    """A raw row is so long that what is read of it has model.seq_length tokens."""

    name = "span_corruption"

    def __init__(self, config: Config) -> None:
        self.density, self.mean_span = config.objective.noise_density, config.objective.mean_span
        super().__init__(config)

    def sizes(self, raw: int) -> Sequence[Sizes]:
        noise, spans = span_counts(raw, self.density, self.mean_span)
        return [Sizes(raw - noise + spans + 1, noise + spans + 1)]

    def roles(self, raw: int) -> Sequence[str]:
        return sentinel_roles(span_counts(raw, self.density, self.mean_span)[1])

    def pair(self, tokens: np.ndarray, special: SpecialTokens, draw: Draw) -> Pair:
        return span_corruption(tokens, self.density, self.mean_span, sentinel_ids(special), draw)
