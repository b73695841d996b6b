"""The frame of a prompt: the tokens that a run's objective put around what is read, and how its model sees that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from teratron.config import UserError
from teratron.data.special import SPELLINGS, find_role
from teratron.data.tokenizer import Tokenizer
from teratron.objectives.rewriting import END, START
from teratron.objectives.span_corruption import sentinel_roles
from teratron.objectives.ul2 import EXTREME, REGULAR, SEQUENTIAL

MOST_SENTINELS = 100
MODES = tuple(spelling for role in (REGULAR, SEQUENTIAL, EXTREME) for spelling in SPELLINGS[role])


@dataclass(frozen=True)
class Frame:
    """How a prompt becomes what is read."""

    tokenizer: Tokenizer
    ends: frozenset[int]
    """Tokens that end a text: that of the end of a document, and bos, as with it the next one begins."""
    start: int | None = None
    """What the decoder beside an encoder begins with; None = there is no encoder."""
    after: tuple[int, ...] = ()
    """Tokens behind what is read."""
    both_sides: bool = False
    """Whether what is read is seen from both sides by a decoder alone."""
    marks: Mapping[str, int] = field(default_factory=dict)
    """Tokens that a prompt may spell out, such as <extra_id_0>."""
    modes: tuple[int, int] | None = None
    """UL2's tokens for filling in and for going on: a prompt begins with one of them."""

    def read(self, prompt: str) -> list[int]:
        """The tokens of what is read: bos, if there is one, the prompt, and what the objective had around it.

        An empty prompt is the start of a document: bos, else eod. Raises `UserError` where there is neither.
        """
        begin = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        ids = [*begin, *self._mode(prompt), *self._encode(prompt), *self.after]
        if ids:
            return ids
        if self.tokenizer.eod is None:
            raise UserError("the prompt is empty, and the tokenizer has no token for the start or end of a document: give some text")
        return [self.tokenizer.eod]

    def _mode(self, prompt: str) -> list[int]:
        if self.modes is None or prompt.startswith(MODES):
            return []
        return [self.modes[not any(mark in prompt for mark in self.marks)]]

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt's character {error.start} is half of one (a lone surrogate): give valid Unicode text") from None
        if not self.marks:
            return self.tokenizer.encode(prompt)
        pieces = re.split(f"({'|'.join(map(re.escape, self.marks))})", prompt)
        return [i for piece in pieces if piece for i in ([self.marks[piece]] if piece in self.marks else self.tokenizer.encode(piece))]


def frame_of(family: str, objective: str | None, tokenizer: Tokenizer) -> Frame:
    """That of a model of this family, learnt with this objective; None = not known.

    Raises `UserError` where the tokenizer lacks a token of it.
    """
    ends = frozenset(token for token in (tokenizer.eod, tokenizer.bos) if token is not None)
    rewrites = objective in ("span_corruption", "ul2")
    if family != "encoder_decoder" and not rewrites:
        return Frame(tokenizer, ends, both_sides=objective == "prefix")
    start = _needed(tokenizer, START, "padding token, with which a decoder begins") if family == "encoder_decoder" else None
    end, modes = _needed(tokenizer, END, "end of a text"), None
    if objective == "ul2":
        modes = _needed(tokenizer, REGULAR, "token [R]"), _needed(tokenizer, SEQUENTIAL, "token [S]")
    return Frame(tokenizer, ends | {end}, start, (end,), start is None, _marks(tokenizer), modes)


def _marks(tokenizer: Tokenizer) -> dict[str, int]:
    found = {spelling: tokenizer.token_id(spelling) for spelling in (*sentinel_roles(MOST_SENTINELS), *SPELLINGS["mask"], *MODES)}
    return {spelling: number for spelling, number in found.items() if number is not None}


def _needed(tokenizer: Tokenizer, role: str, what: str) -> int:
    found = find_role(tokenizer, role)
    if found is None:
        raise UserError(f"this {tokenizer.kind} tokenizer has no {what}: give the one that the model was trained with (--tokenizer FILE)")
    return found
