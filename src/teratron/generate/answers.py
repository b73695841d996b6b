"""Generation by an encoder and a decoder: each prompt is read once, and what is written about it is given out token by token."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from teratron.config import UserError
from teratron.data.special import find_role
from teratron.data.tokenizer import Tokenizer
from teratron.generate.cache import KVCache
from teratron.generate.engine import TokenStream
from teratron.generate.sampler import Sampling
from teratron.models import EncoderDecoder
from teratron.objectives.rewriting import END, START


class AnswerStream(TokenStream):
    """A `TokenStream` of what the decoder writes; the memory's keys and values are made anew for every token."""

    def __init__(
        self,
        model: EncoderDecoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        start: int,
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        vocab: int | None = None,
    ) -> None:
        """start: the token that the decoder begins with; otherwise as of `TokenStream`."""
        super().__init__(model, prompts, sampling, max_new_tokens, stop_ids, seeds, vocab)
        self.start = start
        self.reader, self.writer = model.halves()

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        device, rows = next(self.model.parameters()).device, len(self.prompts)
        columns = list(itertools.zip_longest(*self.prompts))
        tokens = torch.tensor([[token or 0 for token in column] for column in columns], device=device).t()
        real = torch.tensor([[token is not None for token in column] for column in columns], device=device).t()
        places = torch.arange(len(columns), device=device).expand(rows, -1)
        self._places = torch.full((rows, 1), -1, device=device)
        self._read = {"encoder_positions": places, "encoder_segments": real.long() - 1}
        state = self.reader({"encoder_tokens": tokens, "positions": self._places, **self._read})
        self._read["hidden"] = state["hidden"]
        self._cache = KVCache(max(self.limits))
        return self._feed(torch.full((rows,), self.start, device=device))

    @torch.inference_mode()
    def _keep(self, rows: Tensor) -> None:
        super()._keep(rows)
        self._read = {name: tensor[rows] for name, tensor in self._read.items()}

    def _forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        state = {"tokens": tokens, "positions": self._places, "order": self._places}
        return self.writer(state | self._read, cache=self._cache)["hidden"]


def frame_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """The token that a decoder begins with, and the one that ends what is read and what is written."""
    start, end = (find_role(tokenizer, role) for role in (START, END))
    if start is None or end is None:
        raise UserError(
            f"this {tokenizer.kind} tokenizer has no {'padding token, with which a decoder begins' if start is None else 'end of a text'}: "
            "give the one that the model was trained with (--tokenizer FILE)"
        )
    return start, end
