"""Speculative decoding: tokens are guessed cheaply and checked by the model in one pass, which changes the speed and never the text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from teratron.config import UserError
from teratron.generate.decoder import Decoder
from teratron.generate.engine import TokenStream
from teratron.generate.guides import Guide, permitted
from teratron.generate.sampler import Sampling, choose, uniform

if TYPE_CHECKING:
    from teratron.checkpoint import LoadedModel

MATCHES = (16, 8, 4, 2)
"""Tokens at the end of a text that are looked up in it, the longest that is found."""


@dataclass(frozen=True)
class LookUp:
    """What comes next is guessed from where the text's end stood in it before (prompt look-up, Saxena 2023)."""

    tokens: int
    """Tokens guessed at a time, at most; and no more than those that were found."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"lookup = {self.tokens}: expected at least 1 token, such as 8; leave it out to guess none")


@dataclass(frozen=True)
class Draft:
    """What comes next is guessed by a smaller model of the same tokenizer (Leviathan et al. 2023)."""

    loaded: LoadedModel
    tokens: int = 4
    """Tokens guessed at a time."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"draft_tokens = {self.tokens}: expected at least 1, such as 4")


class Guesser(Protocol):
    """Guesses what comes next in the texts of a batch."""

    def guess(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """For each text, by all its tokens, at most `count` tokens, perhaps none. Texts only grow."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch, ascending."""


class SpeculativeStream(TokenStream):
    """A `TokenStream` whose steps may give several tokens of a row.

    All places of a guess are scored in one pass and the token of each is chosen as it would have been without, by the same random number;
    what was guessed counts as far as it is what was chosen. So the tokens are those of a `TokenStream`, up to rounding in the model's
    matrix products, whatever is guessed. Of a look-up's tokens as many are right as any rule could accept (Leviathan et al. 2023).
    """

    def __init__(
        self,
        decoder: Decoder,
        guesser: Guesser,
        tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        guides: Sequence[Guide] | None = None,
    ) -> None:
        """decoder: one that rewinds. tokens: guessed at a time, at most. Others as of `TokenStream`."""
        super().__init__(decoder, sampling, stop_ids, seeds, guides)
        self.guesser, self.most = guesser, tokens
        self.texts = [list(prompt) for prompt in decoder.prompts]
        """Each row's prompt and what has come."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        guesses: list[list[int]] = [[] for _ in self.rows]
        hidden_BSH = self._prefill()[:, -1:] if self.rows else None
        while hidden_BSH is not None:
            chosen = self._choose_all(self.decoder.all_logits(hidden_BSH), guesses)
            yield [pair for row, guess, tokens in zip(self.rows, guesses, chosen, strict=True) for pair in self._accept(row, guess, tokens)]
            self._drop()
            if not self.rows:
                return
            guesses = self._guesses()
            width = max(map(len, guesses))
            fed = [[self.texts[row][-1], *guess, *[0] * (width - len(guess))] for row, guess in zip(self.rows, guesses, strict=True)]
            hidden_BSH = self.decoder.put(fed, [len(self.texts[row]) - 1 for row in self.rows])

    def _choose_all(self, logits_BSV: Tensor, guesses: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens that follow each row's text, the text with one guess more, and so on; S of each row."""
        rows, width = logits_BSV.shape[:2]
        if self.guides is not None:
            allowed = [guide for row, guess in zip(self.rows, guesses, strict=True) for guide in self._guided(row, guess, width)]
            logits_BSV = logits_BSV.masked_fill(~permitted(allowed, logits_BSV.device).view(rows, width, -1), -torch.inf)
        uniforms = [uniform(self.seeds[row], self._given(row) + ahead) for row in self.rows for ahead in range(width)]
        found: list[list[int]] = choose(logits_BSV.flatten(0, 1), self.sampling, uniforms).view(rows, width).tolist()
        return found

    def _guided(self, row: int, guess: Sequence[int], width: int) -> list[Guide]:
        """A row's guide now, behind one guess, and so on; the last one again where no more was guessed."""
        found = [] if self.guides is None else [self.guides[row]]
        for token in guess:
            found.append(found[-1].push(token))
        return found + found[-1:] * (width - len(found))

    def _accept(self, row: int, guess: Sequence[int], chosen: Sequence[int]) -> list[tuple[int, int]]:
        """What a row gets: tokens as far as they were guessed right, and the first one that was not."""
        right = next((n for n, token in enumerate(guess) if token != chosen[n]), len(guess))
        tokens = list(chosen[: right + 1])
        end = next((n for n, token in enumerate(tokens) if token in self.stop_ids), None)
        if end is not None:
            self.finished.add(row)
        given = [(row, token) for token in tokens[:end]]
        self.texts[row] += tokens[:end]
        self._guide(given)
        return given

    def _drop(self) -> None:
        """Go on without the rows that have ended."""
        going = [i for i, row in enumerate(self.rows) if row not in self.finished and self._given(row) < self.decoder.limits[row]]
        if len(going) < len(self.rows):
            self.rows = [self.rows[index] for index in going]
            self._keep(torch.tensor(going, dtype=torch.int64, device=self.decoder.device))
            self.guesser.keep(going)

    def _guesses(self) -> list[list[int]]:
        """No row's guess goes beyond any row's limit, for which the cache has room."""
        room = min(self.decoder.limits[row] - self._given(row) for row in self.rows)
        count = min(self.most, room - 1)
        guesses = self.guesser.guess([self.texts[row] for row in self.rows], count) if count else [[] for _ in self.rows]
        return [self._possible(row, guess) for row, guess in zip(self.rows, guesses, strict=True)]

    def _possible(self, row: int, guess: list[int]) -> list[int]:
        """A guess as far as it does not end the text, and its guide allows it."""
        guide = None if self.guides is None else self.guides[row]
        for place, token in enumerate(guess):
            if token in self.stop_ids or token >= self.decoder.vocab or (guide and not guide.allowed()[token]):
                return guess[:place]
            guide = guide and guide.push(token)
            if guide and guide.finished:
                return guess[:place]
        return guess

    def _given(self, row: int) -> int:
        """How many new tokens a row has."""
        return len(self.texts[row]) - len(self.decoder.prompts[row])


class TextGuesser:
    """Guesses by look-up in the texts themselves."""

    def __init__(self, rows: int) -> None:
        self._known = [dict[tuple[int, ...], int]() for _ in range(rows)]
        """For each row, where the tokens stand that came last behind those that were looked at."""
        self._read = [0] * rows

    def guess(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [self._found(row, text, count) for row, text in enumerate(texts)]

    def keep(self, rows: Sequence[int]) -> None:
        self._known, self._read = [self._known[row] for row in rows], [self._read[row] for row in rows]

    def _found(self, row: int, text: Sequence[int], count: int) -> list[int]:
        known = self._known[row]
        for end in range(self._read[row], len(text)):
            known.update((tuple(text[end - size : end]), end) for size in MATCHES if end >= size)
        self._read[row] = len(text)
        for size in MATCHES:
            place = known.get(tuple(text[-size:])) if len(text) >= size else None
            if place is not None:
                return list(text[place : place + min(count, size)])
        return []


class ModelGuesser:
    """Guesses with a smaller model, whose tokens are chosen by the same rule and the same random numbers as the large one's."""

    def __init__(self, decoder: Decoder, limits: Sequence[int], sampling: Sampling, seeds: Sequence[int]) -> None:
        """decoder: of the same prompts, one that rewinds. limits: new tokens of each row, at most."""
        self.decoder, self.sampling, self.seeds = decoder, sampling, list(seeds)
        decoder.limits = list(limits)
        self.lengths = [len(prompt) for prompt in decoder.prompts]
        self._begun = False

    def guess(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        if not self._begun:
            self.decoder.prefill()
            self._begun = True
        # Of the last guesses all may have been right: then the text's last two tokens are new here.
        ends = [len(text) for text in texts]
        hidden_BSH = self.decoder.put([text[-2:] for text in texts], [end - 2 for end in ends])
        guesses: list[list[int]] = [[] for _ in texts]
        for ahead in range(count):
            places = zip(self.seeds, ends, self.lengths, strict=True)
            uniforms = [uniform(seed, end - length + ahead) for seed, end, length in places]
            chosen = choose(self.decoder.logits(hidden_BSH), self.sampling, uniforms).tolist()
            guesses = [[*guess, token] for guess, token in zip(guesses, chosen, strict=True)]
            if ahead + 1 < count:
                hidden_BSH = self.decoder.put([[token] for token in chosen], [end + ahead for end in ends])
        return guesses

    def keep(self, rows: Sequence[int]) -> None:
        self.seeds, self.lengths = [self.seeds[row] for row in rows], [self.lengths[row] for row in rows]
        if self._begun:
            self.decoder.keep(torch.tensor(rows, dtype=torch.int64, device=self.decoder.device))
