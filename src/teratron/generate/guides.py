"""Guides: what a text may become, said as the tokens that may come next. Here the one that leaves the choice among given texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from teratron.config import UserError
from teratron.data.tokenizer import Tokenizer


class Guide(Protocol):
    """Where one text stands; it never changes, so that beams may share it."""

    @property
    def finished(self) -> bool:
        """Whether no token may follow, not even one that ends the text."""
        ...

    def allowed(self) -> np.ndarray:
        """bool [vocab]: tokens that may come next, those that end the text among them where it may end."""
        ...

    def push(self, token: int) -> Guide:
        """The guide behind one more token, which must be allowed and must not end the text."""
        ...


class Constraint(Protocol):
    """What every text must be."""

    def guide(self, tokenizer: Tokenizer, ends: Collection[int], vocab: int) -> Guide:
        """At the beginning of a text. ends: tokens that end one; vocab: ids that the model has.

        Raises `UserError` where the tokenizer cannot write what is wanted.
        """
        ...


def permitted(guides: Sequence[Guide], device: torch.device) -> Tensor:
    """What each row's guide allows, bool [B, V]. Raises `UserError` where that is nothing."""
    allowed = np.stack([guide.allowed() for guide in guides])
    if not allowed.any(axis=1).all():
        raise UserError("no token of this vocabulary goes on with what was asked for: loosen the constraint, or use another tokenizer")
    return torch.from_numpy(allowed).to(device)


@dataclass(frozen=True)
class Choices:
    """One of these texts and nothing else, each spelled as the tokenizer spells it alone."""

    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.texts or "" in self.texts:
            raise UserError(f"choices = {list(self.texts)}: expected texts of at least one character")

    def guide(self, tokenizer: Tokenizer, ends: Collection[int], vocab: int) -> Guide:
        root = _Node({})
        for text in self.texts:
            ids = tokenizer.encode(text)
            if tokenizer.decode(ids) != text:
                raise UserError(f"choice {text!r}: this {tokenizer.kind} tokenizer makes {tokenizer.decode(ids)!r} of it: give it as that")
            if max(ids) >= vocab:
                raise UserError(f"choice {text!r} has token {max(ids)}, the model's ids are 0 to {vocab - 1}: use the model's tokenizer")
            root.add(ids)
        guide = _Choosing(root, tuple(ends), vocab)
        if not ends and (longer := root.first_inner()):
            shown = tokenizer.decode(longer)
            raise UserError(f"choice {shown!r} begins another, and this tokenizer has no token that ends a text: drop one of them")
        return guide


@dataclass
class _Node:
    """What may follow some tokens."""

    following: dict[int, _Node]
    whole: bool = False
    """Whether these tokens are a choice."""

    def add(self, ids: Sequence[int]) -> None:
        node = self
        for token in ids:
            node = node.following.setdefault(token, _Node({}))
        node.whole = True

    def first_inner(self) -> list[int]:
        """Tokens of a choice with which another begins, or none."""
        for token, node in self.following.items():
            if node.whole and node.following:
                return [token]
            if inner := node.first_inner():
                return [token, *inner]
        return []


@dataclass(frozen=True)
class _Choosing:
    """At a node of the tree of all choices."""

    node: _Node
    ends: tuple[int, ...]
    vocab: int

    @property
    def finished(self) -> bool:
        return not self.node.following

    def allowed(self) -> np.ndarray:
        found = np.zeros(self.vocab, bool)
        found[[*self.node.following, *(self.ends if self.node.whole else ())]] = True
        return found

    def push(self, token: int) -> _Choosing:
        return _Choosing(self.node.following[token], self.ends, self.vocab)
