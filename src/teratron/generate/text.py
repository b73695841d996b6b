"""From tokens to text as they come: whole characters only, spaces kept, stop texts cut out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders make of the first bytes of a character."""
SHORT_WINDOW = 16
"""Undecided tokens up to which every token is tried; a character has at most four, the rest are bytes that are no text."""


class TextDecoder:
    """Turns tokens into pieces of text whose concatenation is what decoding everything at once gives behind the prompt.

    Tokens are decoded behind the piece before them, because SentencePiece drops a leading space and WordPiece joins words. A piece
    that ends in an unfinished character waits for the next tokens. The cost is linear in the number of tokens: the piece before is
    short, and a window that never becomes text is tried at lengths that double.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt)
        self._start = len(self._window)
        """The window's tokens before this one are decoded already; they are there for those behind them."""
        self._known = decode(self._window)
        """The text of those."""
        self._try_at = 0

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain, perhaps none."""
        self._window.append(token)
        undecided = len(self._window) - self._start
        if undecided < self._try_at:
            return ""
        text = self._decode(self._window)
        if text.endswith(UNFINISHED) or len(text) <= len(self._known):
            self._try_at = undecided + 1 if undecided < SHORT_WINDOW else 2 * undecided
            return ""
        piece = text[len(self._known) :]
        del self._window[: self._start]
        self._start, self._try_at, self._known = len(self._window), 0, self._decode(self._window)
        return piece

    def fork(self) -> TextDecoder:
        """Another that goes on from here."""
        other = copy.copy(self)
        other._window = list(self._window)
        return other

    def flush(self) -> str:
        """The text still held back; a character that stays unfinished is U+FFFD."""
        return self._decode(self._window)[len(self._known) :]


class Continuation:
    """What one row has become: its tokens, and its text up to a stop text."""

    def __init__(self, prompt: Sequence[int], decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        """New tokens, those that made a stop text included."""
        self.text = ""
        """New text that is certain; it ends before the first stop text."""
        self.stopped = False
        """Whether a stop text has come."""
        self._decoder = TextDecoder(decode, prompt)
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        self.tokens.append(token)
        return self._release(self._decoder.push(token), last=False)

    def fork(self) -> Continuation:
        """Another that goes on from here."""
        other = copy.copy(self)
        other.tokens, other._decoder = list(self.tokens), self._decoder.fork()
        return other

    def finish(self) -> str:
        """Return the text still held back: no more tokens come."""
        return "" if self.stopped else self._release(self._decoder.flush(), last=True)

    def _release(self, piece: str, last: bool) -> str:
        self._held += piece
        starts = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(starts)
        certain = min(starts) if starts else len(self._held) - (0 if last else self._possible_stop())
        released, self._held = self._held[:certain], self._held[certain:]
        self.text += released
        return released

    def _possible_stop(self) -> int:
        """Characters at the end of the held text with which a stop text may begin."""
        longest = max(map(len, self._stop), default=0)
        for size in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
