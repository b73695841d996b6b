"""Training of WordPiece: the same in every process, BERT's splitting and special tokens, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from teratron.config import UserError
from teratron.data.special import find_role, special_tokens
from teratron.data.tokenizer import load_tokenizer
from teratron.data.wordpiece import train_wordpiece

TEXTS = ["The quick brown fox jumps; the café's foxes jumped quickly, quick as ever.", "Foxes, brown foxes, and Ever browner jumpers."] * 3
PROBE = """
import sys
from teratron.data.wordpiece import train_wordpiece
print(train_wordpiece({!r}, 90).fingerprint)
"""


def test_every_process_learns_the_same() -> None:
    code = [sys.executable, "-c", PROBE.format(TEXTS)]
    found = {subprocess.run(code, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)}
    assert found == {train_wordpiece(TEXTS, 90).fingerprint}


def test_words_are_cut_as_bert_cuts_them(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 90)
    assert [tokenizer.token_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert (tokenizer.kind, tokenizer.cut_rule, tokenizer.eod) == ("wordpiece", "blank", 3)
    pieces = tokenizer.pieces()
    assert tokenizer.encode("CAFÉ") == tokenizer.encode("cafe")
    for text in ("quickest fox", "browner"):
        words = "".join(" " + pieces[number] for number in tokenizer.encode(text)).replace(" ##", "").split()
        assert words == text.split(), "pieces make up the words again"
    assert tokenizer.encode("[MASK]") != [4], "a special token spelled out in text is text"
    cased = train_wordpiece(TEXTS, 90, ("<extra_id_0>",), cased=True)
    assert cased.encode("The") != cased.encode("the")
    assert cased.token_id("<extra_id_0>") == 5
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_pieces_of_a_word_are_joined_and_roles_are_found() -> None:
    tokenizer = train_wordpiece(TEXTS, 90)
    special = special_tokens(tokenizer, ("mask", "cls"), 100, "masked")
    assert special.ids == {"mask": 4, "cls": 2}
    assert find_role(tokenizer, "sep") == 3
    ids = tokenizer.encode("foxes, quickest")
    parts = [tokenizer.pieces()[number].startswith("##") for number in ids]
    assert special.joined(np.array(ids)).tolist() == parts
    assert any(parts)
    assert not special.ordinary[[0, 1, 2, 3, 4, *range(tokenizer.vocab_size, 100)]].any()
    assert special.ordinary[ids].all()


@pytest.mark.parametrize(
    ("size", "texts", "message"), [(20, TEXTS, r"vocab size = 20: expected \d+ to "), (90, [], "the input holds no text")]
)
def test_what_cannot_be_learned_is_refused(size: int, texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_wordpiece(texts, size)
