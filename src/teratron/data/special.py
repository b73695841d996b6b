"""Tokens with a role (mask, sentinels ...) and the words that tokens make up: all that an objective must know of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from teratron.config import UserError
from teratron.data.tokenizer import Tokenizer

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "[R]": ("[R]", "[NLU]"),
    "[S]": ("[S]", "[S2S]"),
    "[X]": ("[X]", "[NLG]"),
}
"""How vocabularies spell a role; a trained tokenizer gets the first. Any other role, such as `<extra_id_0>`, is its own spelling."""


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the data."""

    length: int = 0
    """Inputs of one raw row, which also holds the token after them; 0 = model.seq_length."""
    roles: tuple[str, ...] = ()
    """Tokens that the tokenizer must have (see `SPELLINGS`)."""
    predicted: float = 1.0
    """Share of a row's tokens that are predicted at most; no others cost an output projection."""


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of tokens by role, and what the pieces of words are."""

    vocab_size: int
    """Ids of the model, at least as many as the tokenizer's."""
    eod: int | None = None
    """End-of-document id, when the tokenizer is known and has one."""
    ids: Mapping[str, int] = field(default_factory=dict)
    """Of every role that was asked for."""
    tokenizer: Tokenizer | None = None

    @cached_property
    def ordinary(self) -> np.ndarray:
        """bool [vocab_size]: False where an id has a role, ends documents, or is no token."""
        every = np.arange(self.vocab_size) < (self.tokenizer.vocab_size if self.tokenizer is not None else self.vocab_size)
        roles = (find_role(self.tokenizer, role) for role in SPELLINGS) if self.tokenizer is not None else ()
        every[[found for found in (self.eod, *self.ids.values(), *roles) if found is not None]] = False
        return every

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [vocab_size] each: ids whose piece begins, and ids whose piece ends, with a part of a word; see `joined`."""
        begins, ends = np.zeros((2, self.vocab_size), bool)
        if self.tokenizer is not None:
            for number, piece in enumerate(self.tokenizer.pieces()):
                continues = piece.startswith("##")
                whole_words = self.tokenizer.kind == "wordpiece"
                begins[number] = continues if whole_words else piece[:1].isalnum() or piece[:1] == "\ufffd"
                ends[number] = whole_words or piece[-1:].isalnum() or piece[-1:] == "\ufffd"
        return begins & self.ordinary, ends & self.ordinary

    @cached_property
    def sentence_ends(self) -> np.ndarray:
        """bool [vocab_size]: ids whose piece ends a sentence, or a document."""
        ends = np.zeros(self.vocab_size, bool)
        for number, piece in enumerate(self.tokenizer.pieces() if self.tokenizer is not None else ()):
            ends[number] = piece.rstrip()[-1:] in (".", "!", "?")
        if self.eod is not None:
            ends[self.eod] = True
        return ends

    def joined(self, tokens: np.ndarray) -> np.ndarray:
        """bool like tokens [..., S]: whether a token goes on with the word of the token before it.

        With WordPiece that is what `##` says; else no space and no punctuation lies between the two.
        """
        begins, ends = self.edges
        result = np.zeros(tokens.shape, bool)
        result[..., 1:] = begins[tokens[..., 1:]] & ends[tokens[..., :-1]]
        return result


def find_role(tokenizer: Tokenizer, role: str) -> int | None:
    """The id of a role's token, or None."""
    found = (tokenizer.token_id(spelling) for spelling in SPELLINGS.get(role, (role,)))
    return next((number for number in found if number is not None), None)


def reserved(roles: Sequence[str]) -> tuple[str, ...]:
    """What a tokenizer that is trained for these roles must reserve."""
    return tuple(SPELLINGS.get(role, (role,))[0] for role in roles)


def special_tokens(tokenizer: Tokenizer | None, roles: Sequence[str], vocab_size: int, objective: str) -> SpecialTokens:
    """Find every role's token. Raises `UserError` that names what is missing, and what to use instead."""
    if tokenizer is None:
        if roles:
            raise UserError(
                f"objective.name = {objective} needs special tokens, and the data set does not say which tokenizer made it: "
                "set data.tokenizer"
            )
        return SpecialTokens(vocab_size)
    found = {role: find_role(tokenizer, role) for role in roles}
    missing = [" or ".join(SPELLINGS.get(role, (role,))) for role, number in found.items() if number is None]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"objective.name = {objective} needs the token {missing[0]}{more}, and this {tokenizer.kind} tokenizer has none: give one "
            "that has, or raw text (--data.text) with --data.tokenizer wordpiece:SIZE or bpe:SIZE, which then reserve them"
        )
    ids = {role: number for role, number in found.items() if number is not None}
    return SpecialTokens(vocab_size, tokenizer.eod, ids, tokenizer)
