"""Generation by an encoder and a decoder: each prompt is read once, and what is written about it is given out token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from teratron.generate.cache import KVCache
from teratron.generate.decoder import Decoder
from teratron.models import EncoderDecoder


class AnswerDecoder(Decoder):
    """A `Decoder` of what is written about the prompts; the memory's keys and values are computed once, with the first token."""

    def __init__(
        self,
        model: EncoderDecoder,
        prompts: Sequence[Sequence[int]],
        start: int,
        max_new_tokens: int | None = None,
        vocab: int | None = None,
    ) -> None:
        """start: the token that the decoder begins with; otherwise as of `Decoder`."""
        super().__init__(model, prompts, max_new_tokens, vocab)
        self.start = start
        self.reader, self.writer = model.halves()

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Read all prompts; hidden states [B, 1, H] of the token that the decoder begins with."""
        rows = len(self.prompts)
        columns = list(itertools.zip_longest(*self.prompts))
        tokens = torch.tensor([[token or 0 for token in column] for column in columns], device=self.device).t()
        real = torch.tensor([[token is not None for token in column] for column in columns], device=self.device).t()
        places = torch.arange(len(columns), device=self.device).expand(rows, -1)
        self._places = torch.full((rows, 1), -1, device=self.device)
        self._read = {"encoder_positions": places, "encoder_segments": real.long() - 1}
        state = self.reader({"encoder_tokens": tokens, "positions": self._places, **self._read})
        self._read["hidden"] = state["hidden"]
        self._cache = KVCache(max(self.limits))
        return self.feed(torch.full((rows,), self.start, device=self.device))

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self._read = {name: tensor[rows] for name, tensor in self._read.items()}

    def _forward(self, tokens: Tensor, padded: bool = True, prefix: bool = False) -> Tensor:
        state = {"tokens": tokens, "positions": self._places, "order": self._places}
        return self.writer(state | self._read, cache=self._cache)["hidden"]
