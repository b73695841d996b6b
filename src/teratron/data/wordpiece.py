"""Training of WordPiece vocabularies, as BERT has them."""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from teratron.config import UserError
from teratron.data.bpe import LARGEST
from teratron.data.tok_huggingface import HuggingFaceTokenizer, wordpiece
from teratron.data.tokenizer import Tokenizer

ALWAYS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000
"""Most characters that are pieces, alone and within words; a word with a rarer one is unknown."""


def train_wordpiece(texts: Iterable[str], vocab_size: int, reserved: Sequence[str] = (), cased: bool = False) -> Tokenizer:
    """A WordPiece vocabulary with BERT's splitting into words (Devlin et al. 2019), learned from texts.

    Ids 0 to 4 are [PAD], [UNK], [CLS], [SEP] and [MASK], then come the other `reserved` tokens, the characters, and pieces seen at
    least twice: a small corpus may yield fewer than `vocab_size`. cased: False = text is put in lower case, and accents are taken
    off. The same texts in the same order give the same tokenizer. Raises `UserError` for a size without room for the characters,
    or one above 2**24, and when there is no text.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, trainers

    special = list(dict.fromkeys((*ALWAYS, *reserved)))
    # The trainer numbers characters within words in the order of a hash table, by which it then breaks ties: here they come numbered.
    inner = [f"##{character}" for character in _inner_characters()]
    learner = wordpiece(Engine(models.WordPiece(unk_token="[UNK]")), cased)
    trainer = trainers.WordPieceTrainer(
        vocab_size=min(vocab_size, LARGEST) + len(inner), min_frequency=2, show_progress=False, special_tokens=[*special, *inner]
    )
    characters: Counter[str] = Counter()
    learner.train_from_iterator(_counted(texts, characters), trainer)
    if not characters:
        raise UserError("tokenizer training: the input holds no text: give files or folders with text")
    plain: Counter[str] = Counter()
    for character, count in characters.items():
        plain.update(dict.fromkeys(learner.normalizer.normalize_str(character).replace(" ", ""), count))
    vocab = _vocabulary(learner.get_vocab(), special, plain, vocab_size)
    engine = wordpiece(Engine(models.WordPiece(vocab, unk_token="[UNK]")), cased)
    engine.add_special_tokens(special)
    return HuggingFaceTokenizer(engine)


def _vocabulary(learned: Mapping[str, int], special: Sequence[str], characters: Mapping[str, int], vocab_size: int) -> dict[str, int]:
    """Ids of special tokens, of the most frequent characters, and of pieces made of those, in the order in which they were learned."""
    kept = sorted(sorted(characters, key=lambda character: (-characters[character], character))[:ALPHABET])
    pieces = [*special, *kept, *(inner for inner in (f"##{character}" for character in kept) if inner in learned)]
    if not len(pieces) <= vocab_size <= LARGEST:
        raise UserError(f"vocab size = {vocab_size}: expected {len(pieces)} to {LARGEST:,} for WordPiece on this text, such as 30522")
    known = set(kept)
    merged = (piece for piece in sorted(learned, key=learned.__getitem__) if len(piece.removeprefix("##")) > 1)
    found = (piece for piece in merged if piece not in special and known.issuperset(piece.removeprefix("##")))
    pieces += [piece for piece, _ in zip(found, range(vocab_size - len(pieces)), strict=False)]
    return {piece: number for number, piece in enumerate(pieces)}


def _inner_characters() -> Iterator[str]:
    """Characters that may stand within a word: BERT makes words of their own of punctuation and of Chinese characters."""
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        if unicodedata.category(character)[0] in "LNMS" and "CJK UNIFIED" not in unicodedata.name(character, ""):
            yield character


def _counted(texts: Iterable[str], characters: Counter[str]) -> Iterator[str]:
    """The texts, their characters counted on the way."""
    for text in texts:
        characters.update(text)
        yield text
