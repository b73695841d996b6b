"""Perplexity by the token, the word and the byte: only the last two compare models of different tokenizers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """How long a text is that was scored."""

    tokens: int
    """Tokens that were predicted."""
    words: int
    """Between white space, of the text as it was published."""
    bytes: int
    """In UTF-8, of the text as it was published."""


def perplexities(loss: float, text: Text) -> dict[str, float]:
    """From the sum of all tokens' cross-entropies in nats."""
    sizes = {"token_perplexity": text.tokens, "word_perplexity": text.words, "byte_perplexity": text.bytes}
    found = {name: _exp(loss / size) for name, size in sizes.items()}
    return found | {"bits_per_byte": loss / text.bytes / math.log(2)}


def _exp(power: float) -> float:
    return math.exp(power) if power < 700 else math.inf
