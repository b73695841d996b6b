"""The engine: continues a batch of token sequences, one token a row and step, until each row ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from teratron.generate.decoder import Decoder
from teratron.generate.guides import Guide, permitted
from teratron.generate.sampler import Sampling, choose, uniform


class TokenStream:
    """Iterates over steps, once; each gives (row, token) of the rows that got a token, in row order.

    A row ends at a token of `stop_ids` (which is not given out), where its guide lets nothing more come, after its number of new
    tokens, or when the reader calls `stop`. The tokens of a row do not depend on the other rows, up to rounding in the model's
    matrix products.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        guides: Sequence[Guide] | None = None,
    ) -> None:
        """seeds: one a row; None = `sampling.seed` for every row. guides: what each row may become; None = anything."""
        self.decoder, self.sampling, self.stop_ids = decoder, sampling, frozenset(stop_ids)
        count = len(decoder.prompts)
        self.seeds = [sampling.seed] * count if seeds is None else list(seeds)
        self.guides = None if guides is None else list(guides)
        self.rows = list(range(count))
        """The rows that go on, in the order of the batch."""
        self.finished: set[int] = set()
        """The rows that ended by themselves or by `stop`, not at their limit."""

    def stop(self, row: int) -> None:
        """End a row before its limit; call it between steps."""
        self.finished.add(row)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if not self.rows:
            return
        hidden, place = self._prefill(), 0
        while True:
            chosen = self._choose(self._logits(hidden), place)
            place += 1
            step = list(zip(self.rows, chosen.tolist(), strict=True))
            given = [(row, token) for row, token in step if token not in self.stop_ids]
            self.finished.update(row for row, token in step if token in self.stop_ids)
            self._guide(given)
            yield given
            going = [i for i, row in enumerate(self.rows) if row not in self.finished and place < self.decoder.limits[row]]
            if not going:
                return
            if len(going) < len(self.rows):
                kept = torch.tensor(going, device=chosen.device)
                self.rows, chosen = [self.rows[index] for index in going], chosen[kept]
                self._keep(kept)
            hidden = self._feed(chosen)

    def _logits(self, hidden_BSH: Tensor) -> Tensor:
        """Scores [B, V] of what comes next, minus infinity where a guide allows it not."""
        logits = self.decoder.logits(hidden_BSH)
        if self.guides is None:
            return logits
        return logits.masked_fill(~permitted([self.guides[row] for row in self.rows], logits.device), -torch.inf)

    def _guide(self, given: Sequence[tuple[int, int]]) -> None:
        """Tell the guides which tokens have come; rows end where none may follow."""
        if self.guides is None:
            return
        for row, token in given:
            self.guides[row] = self.guides[row].push(token)
            if self.guides[row].finished:
                self.finished.add(row)

    def _choose(self, logits_BV: Tensor, place: int) -> Tensor:
        """New token number `place` (from 0) of each row, int64 [B]."""
        return choose(logits_BV, self.sampling, [uniform(self.seeds[row], place) for row in self.rows])

    def _prefill(self) -> Tensor:
        """Hidden states [B, S, H] of all prompts."""
        return self.decoder.prefill()

    def _keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 [B'], ascending."""
        self.decoder.keep(rows)

    def _feed(self, tokens_B: Tensor) -> Tensor:
        """Hidden states [B, 1, H] of one more token of each row."""
        return self.decoder.feed(tokens_B)
