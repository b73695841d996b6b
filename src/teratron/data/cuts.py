"""Where a long text may be cut so that its pieces have exactly the tokens of the whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

CutRule = Literal["anywhere", "blank", "word", "never"]
"""A tokenizer's promise: encode(a) + encode(b) == encode(a + b) at these places.

anywhere: between any two characters (bytes, characters). blank: before any space or newline (WordPiece, which drops them).
word: before a space that follows a non-space, or between a newline and what follows when neither neighbour is a space
(byte-level BPE whose pre-tokenizer is GPT-2's or one of its descendants). never: SentencePiece and everything unknown.

Why `word` is safe: no alternative of these regular expressions looks behind; all that can hold a non-space character end
before the next space; and the only one that looks ahead, `\\s+(?!\\S)`, starts at a space, hence never straddles such a
place. A lone newline between non-spaces is either a match of its own (GPT-2) or the end of one (`[\\r\\n/]*` and
`\\s*[\\r\\n]+` of later ones: hence no cut before a slash).
"""

PIECE = 1 << 20
"""Characters after which a cut is looked for."""

_PLACES = {
    "blank": re.compile(r"(?<=[\s\S])(?=[ \n])"),
    "word": re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])"),
}


class NoCut(Exception):
    """A stretch of text longer than allowed has no place where it may be cut; `args[0]` is its length in characters."""


def last_cut(text: str, rule: CutRule, start: int = 0) -> int:
    """The last place in `(start, len(text))` where the text may be cut whatever follows it; 0 if there is none."""
    if rule == "anywhere":
        return len(text)
    if rule == "never":
        return 0
    # The tail nearly always holds a place, and regular expressions only search forwards.
    for begin in (max(len(text) - 4096, start), start):
        cut = max((place.start() for place in _PLACES[rule].finditer(text, begin)), default=0)
        if cut:
            return cut
    return 0


def cut_stream(blocks: Iterable[str], rule: CutRule, size: int = PIECE, limit: int | None = None) -> Iterator[str]:
    """Regroup blocks of text into pieces of about `size` characters, cut only where `rule` allows.

    Raises `NoCut` for a stretch of more than `limit` characters without such a place.
    """
    held, searched = "", 0
    for block in blocks:
        held += block
        if len(held) >= size and (cut := last_cut(held, rule, searched)):
            yield held[:cut]
            held, searched = held[cut:], 0
        elif len(held) >= size:
            searched = max(len(held) - 2, 0)
        if limit is not None and len(held) > max(limit, size):
            raise NoCut(len(held))
    if held:
        yield held


def pieces(text: str, rule: CutRule, size: int = PIECE) -> Iterator[str]:
    """One text in pieces of about `size` characters."""
    if len(text) <= size or rule == "never":
        yield text
        return
    yield from cut_stream((text[start : start + size] for start in range(0, len(text), size)), rule, size)
