"""Streaming text: pieces add up to the whole, hold only whole characters, and end before stop texts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teratron.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from teratron.generate.text import UNFINISHED, Continuation, TextDecoder

BYTES = ByteTokenizer()


def pieces_of(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    decoder = TextDecoder(tokenizer.decode, prompt)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


@given(st.text(max_size=5), st.text(max_size=30))
def test_pieces_are_whole_characters_that_add_up(prompt: str, text: str) -> None:
    pieces = pieces_of(BYTES, BYTES.encode(prompt), BYTES.encode(text))
    assert "".join(pieces) == text
    assert UNFINISHED in text or all(UNFINISHED not in piece for piece in pieces)


@given(st.lists(st.sampled_from([0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 256]), max_size=60))
def test_bytes_that_are_no_text_come_out_as_decoding_at_once_gives_them(tokens: list[int]) -> None:
    assert "".join(pieces_of(BYTES, [], tokens)) == BYTES.decode(tokens)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces_of(BYTES, [65], BYTES.encode("é€😀")) == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_unfinished_character_at_the_end_is_shown_as_such() -> None:
    assert pieces_of(BYTES, [65], BYTES.encode("€")[:2]) == ["", "", UNFINISHED]


@pytest.mark.parametrize("tokens", [[97] * 5000, [0xFF] * 5000, BYTES.encode("€") * 1700], ids=["letters", "no text", "characters"])
def test_work_is_linear(tokens: list[int]) -> None:
    work = 0

    def decode(ids: list[int]) -> str:
        nonlocal work
        work += len(ids)
        return BYTES.decode(ids)

    decoder = TextDecoder(decode, [])
    text = "".join([*(decoder.push(token) for token in tokens), decoder.flush()])
    assert text == BYTES.decode(tokens)
    assert work < 10 * len(tokens)


def test_sentencepiece_keeps_its_spaces(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data" / "ckpt_stories260k" / "tok512.model")
    prompt = [1, *tokenizer.encode("Once upon a time")]
    tokens = tokenizer.encode("there was a  très petite 小猫 with 😀.")
    pieces = pieces_of(tokenizer, prompt, tokens)
    assert "".join(pieces) == tokenizer.decode(prompt + tokens)[len("Once upon a time") :]
    assert pieces[0].startswith(" ")
    assert not any(UNFINISHED in piece for piece in pieces)


def test_sentencepiece_any_tokens(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data" / "ckpt_stories260k" / "tok512.model")
    draw = random.Random(0)
    for _ in range(200):
        prompt = [1, *draw.choices(range(tokenizer.vocab_size), k=draw.randrange(4))]
        tokens = draw.choices(range(tokenizer.vocab_size), k=40)
        whole = tokenizer.decode(prompt + tokens)
        assert whole.endswith("".join(pieces_of(tokenizer, prompt, tokens)))


def run(text: str, *stop: str) -> tuple[Continuation, list[str]]:
    row = Continuation([], BYTES.decode, stop)
    pieces = []
    for token in BYTES.encode(text):
        pieces.append(row.push(token))
        if row.stopped:
            break
    return row, [*pieces, row.finish()]


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ("two",), "one "),
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("one\n\ntwo", ("\n\n", "two"), "one"),
        ("x é y", ("é",), "x "),
        ("STOP", ("STOP",), ""),
        ("almost STO", ("STOP",), "almost STO"),
        ("nothing", (), "nothing"),
    ],
)
def test_stop_text_is_never_shown(text: str, stop: tuple[str, ...], wanted: str) -> None:
    row, pieces = run(text, *stop)
    assert "".join(pieces) == row.text == wanted
    assert row.stopped == (wanted != text)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_text_that_is_complete_first(text: str, stop: list[str]) -> None:
    ends = [size for size in range(len(text) + 1) if any(text[:size].endswith(one) for one in stop)]
    wanted = text if not ends else min((text[: ends[0]].removesuffix(one) for one in stop if text[: ends[0]].endswith(one)), key=len)
    assert run(text, *stop)[0].text == wanted


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    assert run("abcabd", "abd")[1] == ["", "", "abc", "", "", "", ""]
