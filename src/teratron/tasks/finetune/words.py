"""A text word by word: its tokens, the token that stands for each word, and pieces that are cut between words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Words:
    """The words of one text as token ids, at least one token each."""

    def __init__(self, ids: Sequence[np.ndarray], causal: bool) -> None:
        """causal: the model sees nothing that is later, so that a word's last token stands for it and not its first."""
        self.tokens = np.concatenate(ids)
        self.starts = np.cumsum([0, *map(len, ids)])
        """Where each word begins, and the end: int64 [words + 1]."""
        self.anchors = self.starts[1:] - 1 if causal else self.starts[:-1]
        """Where the token is that stands for each word, int64 [words]."""

    def __len__(self) -> int:
        return len(self.anchors)

    def pieces(self, room: int, stride: int) -> list[range]:
        """Words of each piece of at most `room` tokens, neighbours sharing at most `stride` tokens; with stride 0 the first piece alone.

        No word may be longer than `room`.
        """
        found: list[range] = []
        start = 0
        while True:
            stop = int(np.searchsorted(self.starts, self.starts[start] + room, "right")) - 1
            found.append(range(start, stop))
            if stop == len(self) or not stride:
                return found
            start = max(int(np.searchsorted(self.starts, self.starts[stop] - stride)), start + 1)

    def cut(self, piece: range) -> np.ndarray:
        """The tokens of a piece."""
        return self.tokens[self.starts[piece.start] : self.starts[piece.stop]]

    def places(self, piece: range) -> np.ndarray:
        """Where the tokens that stand for the words of a piece are in it."""
        return self.anchors[piece.start : piece.stop] - self.starts[piece.start]


def homes(pieces: Sequence[range]) -> list[np.ndarray]:
    """The words of each piece that have more of their text around them there than in any other: every word once."""
    depth = np.full(max(piece.stop for piece in pieces), -1)
    home = np.zeros_like(depth)
    for number, piece in enumerate(pieces):
        words = np.arange(piece.start, piece.stop)
        inside = np.minimum(words - piece.start, piece.stop - 1 - words)
        home[words[inside > depth[words]]] = number
        depth[words] = np.maximum(depth[words], inside)
    return [np.flatnonzero(home == number) for number in range(len(pieces))]
