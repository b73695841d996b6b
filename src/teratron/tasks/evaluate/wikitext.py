"""WikiText as it was before it was cut into words: the rules of the zero-shot evaluations of GPT-2 and Megatron-LM."""

from __future__ import annotations

import re

_BEFORE = [
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
]
_PAIRS = [(r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'")]
"""Between each of these, white space at both ends goes."""
_AFTER = [
    *(("= " * (count - 1) + "=", "=" * count) for count in (4, 3, 2)),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def join_words(text: str) -> str:
    """Undo the cuts around punctuation and numbers, as far as simple rules can."""
    for cut, joined in _BEFORE:
        text = text.replace(cut, joined)
    for left, right in _PAIRS:
        text = re.sub(rf"({left})\s*([^{right}]*?)\s*({right})", r"\1\2\3", text)
    for cut, joined in _AFTER:
        text = text.replace(cut, joined)
    return text
