"""Beam search: of all continuations the likeliest, for their length, of those that a bounded number of beams finds."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teratron.config import UserError
from teratron.generate.decoder import Decoder
from teratron.generate.guides import Guide, permitted
from teratron.generate.sampler import finite_peaks, top_columns
from teratron.generate.text import Continuation


@dataclass(frozen=True)
class BeamSearch:
    """How continuations are found. Nothing is drawn at random; among equals the first beam and the lowest id come first.

    A continuation of n tokens, its end among them, scores the sum of their log-probabilities / n ** length_penalty (as `transformers`
    has it; other than the penalty of Wu et al. 2016).
    """

    beams: int
    """Continuations that go on beside each other."""
    length_penalty: float = 1.0
    """Above 0 favours long continuations, below 0 short ones; 0 takes the sum as it is."""
    early_stopping: bool = False
    """Whether a prompt is done when as many continuations as beams have ended, rather than when none that goes on can be better."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise UserError(f"beams = {self.beams}: expected at least 1, such as 4")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty = {self.length_penalty}: expected a number, such as 1")

    def score(self, total: float, length: int) -> float:
        """Of a continuation with this sum of log-probabilities and so many tokens."""
        return total / length**self.length_penalty

    def bound(self, total: float, length: int, limit: int) -> float:
        """The highest score that what goes on with it can have."""
        return self.score(total, limit if self.length_penalty > 0 else length + 1)


@dataclass(frozen=True)
class Hypothesis:
    """A continuation, or the beginning of one."""

    row: Continuation
    guide: Guide | None = None
    total: float = 0.0
    """Sum of its tokens' log-probabilities; what a guide forbids is not taken out of them."""
    length: int = 0
    """Tokens, the one that ends it included."""
    finished: bool = False
    """Whether it ended by itself."""

    def behind(self, token: int, total: float, stop_ids: Collection[int]) -> Hypothesis:
        """With one more token, and the sum that it then has."""
        if token in stop_ids:
            return Hypothesis(self.row, None, total, self.length + 1, True)
        row, guide = self.row.fork(), self.guide and self.guide.push(token)
        row.push(token)
        return Hypothesis(row, guide, total, self.length + 1, row.stopped or bool(guide and guide.finished))

    def complete(self) -> Hypothesis:
        """With all of its text."""
        row = self.row.fork()
        row.finish()
        return replace(self, row=row)


class _Prompt:
    """The search behind one prompt."""

    def __init__(self, search: BeamSearch, limit: int, stop_ids: Collection[int], start: Hypothesis) -> None:
        self.search, self.limit, self.stop_ids = search, limit, stop_ids
        self.open, self.ended = [start], list[Hypothesis]()

    def advance(self, candidates: Sequence[tuple[float, int, int]]) -> list[tuple[int, int]]:
        """Choose among (sum, open beam, token), best first; returns the beam and token of each that goes on."""
        going, chosen = list[Hypothesis](), list[tuple[int, int]]()
        for place, (total, beam, token) in enumerate(candidates):
            if place >= self.search.beams == len(going):
                break
            longer = self.open[beam].behind(token, total, self.stop_ids)
            if not longer.finished and longer.length < self.limit:
                if len(going) < self.search.beams:
                    going.append(longer)
                    chosen.append((beam, token))
            elif place < self.search.beams:  # others would never have been tried with so many beams
                self.ended.append(longer)
        self.ended = sorted(self.ended, key=self._score, reverse=True)[: self.search.beams]
        self.open = going
        return [] if self._done() else chosen

    def _score(self, hypothesis: Hypothesis) -> float:
        return self.search.score(hypothesis.total, hypothesis.length)

    def _done(self) -> bool:
        if not self.open or len(self.ended) < self.search.beams:
            return not self.open
        bound = max(self.search.bound(beam.total, beam.length, self.limit) for beam in self.open)
        return self.search.early_stopping or bound <= self._score(self.ended[-1])


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    search: BeamSearch,
    begun: Sequence[Continuation],
    stop_ids: Collection[int] = (),
    guides: Sequence[Guide] | None = None,
) -> list[list[Hypothesis]]:
    """The continuations found behind each prompt, best first, at most as many as beams.

    They do not depend on the other prompts of the batch, up to rounding in the model's matrix products.

    Args: begun: what each prompt's continuations begin as. stop_ids, guides: as of `TokenStream`.
    """
    starts = [Hypothesis(row, guides[n] if guides else None) for n, row in enumerate(begun)]
    prompts = [_Prompt(search, limit, stop_ids, start) for limit, start in zip(decoder.limits, starts, strict=True)]
    going, width = prompts, search.beams * max(2, 1 + len(stop_ids))
    hidden_BSH = decoder.prefill() if prompts else None
    while hidden_BSH is not None:
        best, first, rows, tokens, left = _best(decoder.logits(hidden_BSH), going, width), 0, [], [], []
        for prompt, candidates in zip(going, best, strict=True):
            count, chosen = len(prompt.open), prompt.advance(candidates)
            rows += [first + beam for beam, _ in chosen]
            tokens += [token for _, token in chosen]
            left += [prompt] if chosen else []
            first += count
        going = left
        if rows:
            decoder.keep(torch.tensor(rows, device=decoder.device))
        hidden_BSH = decoder.feed(torch.tensor(tokens, device=decoder.device)) if rows else None
    return [[hypothesis.complete() for hypothesis in prompt.ended] for prompt in prompts]


def _best(logits_BV: Tensor, prompts: Sequence[_Prompt], width: int) -> list[list[tuple[float, int, int]]]:
    """For each prompt the likeliest ways on, (sum, open beam, token), best first, at most `width`; B counts the open beams of all."""
    beams = [beam for prompt in prompts for beam in prompt.open]
    likely_BV = (logits_BV.double() - finite_peaks(logits_BV)).log_softmax(-1)
    if beams[0].guide is not None:
        likely_BV = likely_BV.masked_fill(~permitted([beam.guide for beam in beams if beam.guide], likely_BV.device), -torch.inf)
    totals_BV = likely_BV + torch.tensor([beam.total for beam in beams], dtype=torch.float64, device=likely_BV.device)[:, None]
    ids_BC = top_columns(totals_BV, min(width, totals_BV.shape[1]))
    totals, ids = totals_BV.gather(-1, ids_BC).tolist(), ids_BC.tolist()
    found, first = [], 0
    for prompt in prompts:
        rows = range(first, first + len(prompt.open))
        pairs = [(-total, row - first, token) for row in rows for total, token in zip(totals[row], ids[row], strict=True)]
        found.append([(-cost, beam, token) for cost, beam, token in sorted(pairs)[:width] if cost < math.inf])
        first += len(prompt.open)
    return found
