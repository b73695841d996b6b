"""How much generated text degenerates: repetition, diversity, perplexity and coherence of continuations (Su et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teratron.models import GPT

Items = Sequence[Hashable]
"""A text as words or tokens."""


def repetition(texts: Sequence[Items], n: int) -> float:
    """rep-n: percent of the n-grams of all texts that their own text has had before; 0 where there are none."""
    grams = [[tuple(text[start : start + n]) for start in range(len(text) - n + 1)] for text in texts]
    total = sum(map(len, grams))
    return 100 * (1 - sum(len(set(found)) for found in grams) / total) if total else 0.0


def diversity(texts: Sequence[Items]) -> float:
    """Product of the shares of 2-, 3- and 4-grams that are no repetition: 1 = nothing is said twice."""
    return math.prod(1 - repetition(texts, n) / 100 for n in (2, 3, 4))


@dataclass(frozen=True)
class Judgement:
    """What a model thinks of continuations."""

    perplexity: float
    """Of their tokens, each given the prefix and those before it."""
    coherence: float
    """Nats a token by which the prefix makes them likelier; the first token of each is left out."""


def judge(model: GPT, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Judgement:
    """Score continuations of at least two tokens each, by a model whose positions hold them behind their prefixes.

    Likelihood alone would praise a text that repeats itself, which is likely once it has begun. That it is as likely without
    its prefix is taken off here: what is left is what the prefix has told (pointwise mutual information).
    """
    behind = [log_likelihoods(model, [*prefix, *text])[-len(text) :] for prefix, text in zip(prefixes, continuations, strict=True)]
    alone = [log_likelihoods(model, text) for text in continuations]
    told = torch.cat([with_prefix[1:] - without for with_prefix, without in zip(behind, alone, strict=True)])
    return Judgement(math.exp(-torch.cat(behind).mean().item()), told.mean().item())


@torch.inference_mode()
def log_likelihoods(model: GPT, tokens: Sequence[int]) -> Tensor:
    """The log-probability of each token but the first, given those before it, float64 [S - 1]."""
    device = next(model.parameters()).device
    row = torch.tensor([tokens], device=device)
    hidden = model({"tokens": row[:, :-1], "positions": torch.arange(len(tokens) - 1, device=device)[None]})["hidden"]
    return model.head.output(hidden)[0].double().log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
