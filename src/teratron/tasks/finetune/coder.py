"""Texts of a task as token ids in the frame that a family of models knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teratron.config import ModelConfig, UserError
from teratron.data.special import SPELLINGS, find_role
from teratron.data.tokenizer import Tokenizer
from teratron.tasks.finetune.words import Words

SPACED = ("bpe", "bytes", "chars")
"""Kinds of tokenizers in which a word in a text begins with its space."""


@dataclass(frozen=True)
class Framed:
    """One sequence, and where a class of all of it is read: at [CLS], or at the end of what a decoder reads."""

    tokens: np.ndarray
    types: np.ndarray
    """0 in the first text, 1 in the second."""
    mark: int
    starts: tuple[int, ...]
    """Where each text begins."""


class Coder:
    """Encodes for one model. Encoders read [CLS] a [SEP] b [SEP], decoders, XLNet and the encoder of T5 a <end> b <end>."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, length: int) -> None:
        """length: of the longest sequence, in tokens. Raises `UserError` for a tokenizer without the tokens of the frame."""
        self.tokenizer, self.config, self.length = tokenizer, config, length
        self.cls = self._role("cls") if config.family == "encoder" else None
        end = self._role("sep") if config.family in ("encoder", "encoder_decoder") else tokenizer.eod
        self.start = self._role("pad") if config.family == "encoder_decoder" else None
        """What a decoder that answers an encoder begins with."""
        if end is None:
            raise UserError("this tokenizer has no end-of-document token, which ends what this model reads: choose a model that has one")
        self.end = end

    def _role(self, role: str) -> int:
        found = find_role(self.tokenizer, role)
        if found is None:
            spelt = " or ".join(SPELLINGS.get(role, (role,)))
            raise UserError(f"the model's tokenizer has no {spelt}, which model.family = {self.config.family} reads: choose another model")
        return found

    @property
    def frame(self) -> int:
        """Tokens around one text."""
        return 1 + (self.cls is not None)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts, without a frame."""
        return [np.array(ids, np.int64) for ids in self.tokenizer.encode_batch(list(texts))]

    def framed(self, *texts: np.ndarray, keep: int = 0) -> Framed:
        """Ids of one or two texts in a frame. What is too long loses the end of text number `keep`'s longer companion, else its own."""
        texts = self._fitted(texts, keep)
        head = [] if self.cls is None else [self.cls]
        pieces, types, starts, place = [np.array(head, np.int64)], [np.zeros(len(head), np.int64)], [], len(head)
        for number, text in enumerate(texts):
            starts.append(place)
            pieces += [text, np.array([self.end])]
            types.append(np.full(len(text) + 1, number))
            place += len(text) + 1
        mark = 0 if self.cls is not None else place - 1
        return Framed(np.concatenate(pieces), np.concatenate(types), mark, tuple(starts))

    def _fitted(self, texts: tuple[np.ndarray, ...], keep: int) -> tuple[np.ndarray, ...]:
        room = self.length - len(texts) - (self.cls is not None)
        if len(texts) == 1:
            return (texts[0][:room],)
        first, second = (keep, 1 - keep)
        lengths = {first: min(len(texts[first]), max(room - len(texts[second]), room // 2)), second: 0}
        lengths[second] = room - lengths[first]
        return tuple(text[: lengths[number]] for number, text in enumerate(texts))

    def words(self, words: Sequence[str], apart: Sequence[bool] = ()) -> Words:
        """A text of these words, each encoded by itself as it stands there.

        apart: whether a space stands before each; empty = before all but the first. A word that encodes to nothing is unknown; of one
        longer than a quarter of the longest sequence the end is left out.
        """
        apart = apart or [number > 0 for number in range(len(words))]
        spaced = self.tokenizer.kind in SPACED
        found = self.encode([f" {word}" if spaced and space else word for word, space in zip(words, apart, strict=True)])
        unknown = find_role(self.tokenizer, "unknown")
        nothing = np.array([self.end if unknown is None else unknown])
        most = max(1, self.length // 4)
        return Words([ids[:most] if len(ids) else nothing for ids in found], self.config.family == "gpt")

    def fields(self, framed: Framed) -> dict[str, np.ndarray]:
        """The fields of an example that the model reads, of one stream."""
        fields = {"tokens": framed.tokens}
        return fields | {"token_types": framed.types} if self.config.token_types > 1 else fields
