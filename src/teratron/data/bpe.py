"""Training of byte-level byte-pair encodings: any text of any language has tokens, and comes back unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from teratron.config import UserError
from teratron.data.tok_huggingface import HuggingFaceTokenizer, byte_level
from teratron.data.tokenizer import END_OF_TEXT, Tokenizer

SMALLEST = 257
"""<|endoftext|> and the 256 bytes."""
LARGEST = 1 << 24
"""Far beyond any vocabulary in use; the trainer reserves memory for all of it at once."""


def train_bpe(texts: Iterable[str], vocab_size: int, reserved: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting into words (Radford et al. 2019), learned from texts.

    Id 0 is <|endoftext|>, then come the `reserved` tokens, which no text has, the 256 bytes, then merges of pairs seen at least
    twice: a small corpus may yield fewer than `vocab_size` tokens. The same texts in the same order give the same tokenizer.
    Memory grows with the number of distinct words, not with the length of the texts.

    Raises `UserError` for a size below 257 or above 2**24, and when there is no text.
    """
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < SMALLEST + len(reserved):
        others = f" and {len(reserved)} more special tokens" if reserved else ""
        raise UserError(f"vocab size = {vocab_size}: expected at least {SMALLEST + len(reserved)}, the 256 bytes, {END_OF_TEXT}{others}")
    if vocab_size > LARGEST:
        raise UserError(f"vocab size = {vocab_size}: expected at most {LARGEST:,}, such as 50257")
    engine = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT, *reserved],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    seen = _Seen(texts)
    engine.train_from_iterator(seen, trainer)
    if not seen.characters:
        raise UserError("tokenizer training: the input holds no text: give files or folders with text")
    return HuggingFaceTokenizer(engine)


class _Seen:
    """Texts that count the characters taken from them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.characters = 0

    def __iter__(self) -> _Seen:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.characters += len(text)
        return text
