"""Guides by a regular expression or a JSON schema, which the llguidance package turns into the tokens that may come next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from teratron.config import UserError
from teratron.data.tokenizer import Tokenizer

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` writes it: free white space could go on for ever."""


@dataclass(frozen=True)
class Regex:
    """Text that matches an expression as a whole; syntax of Rust's `regex`, without look-around and back-references."""

    pattern: str

    def guide(self, tokenizer: Tokenizer, ends: Collection[int], vocab: int) -> Grammatical:
        matcher = _library().LLMatcher
        pattern = f"( )?(?:{self.pattern})" if _begins_with_space(tokenizer) else self.pattern
        return _begun(matcher.grammar_from_regex(pattern), f"regex = {self.pattern!r}", tokenizer, ends, vocab)


@dataclass(frozen=True)
class JsonSchema:
    """JSON of a schema (draft 2020-12), its properties in the schema's order, spaced as `json.dumps` does.

    The schema's own "x-guidance" key changes the spacing: see llguidance's documentation.
    """

    schema: str | Mapping[str, Any]
    """As an object, or the text of one."""

    def guide(self, tokenizer: Tokenizer, ends: Collection[int], vocab: int) -> Grammatical:
        try:
            schema = json.loads(self.schema) if isinstance(self.schema, str) else dict(self.schema)
        except ValueError as error:
            raise UserError(f"json_schema: not JSON ({error}): give an object such as {{'type': 'object'}}") from None
        if not isinstance(schema, dict):
            raise UserError(f"json_schema: a JSON {type(schema).__name__}, expected an object such as {{'type': 'object'}}")
        space = '" "? ' if _begins_with_space(tokenizer) else ""
        lark = f"start: {space}json\njson: %json {json.dumps({'x-guidance': COMPACT} | schema)}"
        return _begun(_library().LLMatcher.grammar_from_lark(lark), "json_schema", tokenizer, ends, vocab)


class Grammatical:
    """Where a text stands in a grammar."""

    def __init__(self, matcher: Any, vocab: int, ends: tuple[int, ...]) -> None:
        self._matcher, self._vocab, self._ends = matcher, vocab, ends

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        found = np.unpackbits(bits, count=self._vocab, bitorder="little").astype(bool)
        found[list(self._ends)] = self._matcher.is_accepting()
        return found

    def push(self, token: int) -> Grammatical:
        matcher = self._matcher.deep_copy()
        if not matcher.consume_token(token):
            why = _first_line(matcher.get_error())
            raise UserError(f"this tokenizer cannot write what was asked for ({why}): loosen the constraint, or use another tokenizer")
        return Grammatical(matcher, self._vocab, self._ends)


def _begun(grammar: str, named: str, tokenizer: Tokenizer, ends: Collection[int], vocab: int) -> Grammatical:
    """At the beginning of a text of this grammar."""
    library, spelled = _library(), tokenizer.token_bytes()[:vocab]
    end = next((token for token in ends if token < vocab), len(spelled))  # the library wants one, also where there is none
    words = _Words([*(spelling or b"" for spelling in spelled), b""], end, tokenizer)
    words.special_token_ids = [number for number, spelling in enumerate([*spelled, None]) if spelling is None]
    known = library.LLTokenizer(library.TokenizerWrapper(words))
    matcher = library.LLMatcher(known, grammar, log_level=0)
    if matcher.is_error():
        raise UserError(f"{named}: {_first_line(matcher.get_error())}: correct it, or leave it out")
    return Grammatical(matcher, vocab, tuple(token for token in ends if token < vocab))


class _Words:
    """A tokenizer as the library asks for it."""

    bos_token_id = None
    special_token_ids: list[int]

    def __init__(self, tokens: list[bytes], eos_token_id: int, tokenizer: Tokenizer) -> None:
        self.tokens, self.eos_token_id, self._tokenizer = tokens, eos_token_id, tokenizer
        self._ids = {spelling: number for number, spelling in enumerate(tokens) if spelling}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """The tokens with which a text that must come is written: the usual ones, but not a space that no one asked for."""
        whole = text.encode()
        with contextlib.suppress(UserError):  # of a tokenizer that does not know a character
            ids = self._tokenizer.encode(text)
            if b"".join(self.tokens[token] for token in ids) == whole:
                return ids
        return self._longest_first(whole)

    def _longest_first(self, whole: bytes) -> list[int]:
        found, start = list[int](), 0
        while start < len(whole):
            sizes = range(min(self._longest, len(whole) - start), 0, -1)
            size = next((size for size in sizes if whole[start : start + size] in self._ids), 0)
            if not size:
                return found
            found.append(self._ids[whole[start : start + size]])
            start += size
        return found


def _begins_with_space(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a space before a text, which no one asked for."""
    return (tokenizer.token_bytes()[tokenizer.encode("a")[0]] or b"").startswith(b" ")


def _first_line(error: str) -> str:
    """Of what the library says, on one line: it points at places with several."""
    lines = [line.strip(" ^\n") for line in error.splitlines()]
    kept = [line for line in lines if line and not line.startswith("start:")]
    return "; ".join(kept[:1] + [line for line in kept[1:] if line.startswith("error:")])


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UserError("a regular expression or JSON schema needs the llguidance package: pip install llguidance") from None
    return llguidance
