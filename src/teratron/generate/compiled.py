"""A decoder whose step is one compiled program of fixed shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teratron.config import UserError
from teratron.generate.cache import FixedCache
from teratron.generate.decoder import Decoder
from teratron.models import GPT, EncoderDecoder
from teratron.parallel.device import has_compiler

LEAST_ROOM = 64
"""Columns of a small cache."""


class CompiledDecoder(Decoder):
    """A `Decoder` of a `GPT` that compiles its step once for a model, a number of rows and a power of two of tokens.

    Rows that have ended are computed on, as the shapes stay. What is compiled is kept for other decoders of the process, and on disk by
    PyTorch.
    """

    def __init__(
        self,
        model: GPT | EncoderDecoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        vocab: int | None = None,
        both_sides: bool = False,
    ) -> None:
        """Arguments as of `Decoder`."""
        super().__init__(model, prompts, max_new_tokens, vocab, both_sides, rewinds=True)
        self._going = len(prompts)

    def room(self, tokens: int) -> int:
        return max(LEAST_ROOM, 1 << (tokens - 1).bit_length())

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 [B'], in this order; no more than there were."""
        self._going = len(rows)
        super().keep(self._filled(rows))

    @torch.inference_mode()
    def feed(self, tokens_B: Tensor) -> Tensor:
        return super().feed(self._filled(tokens_B))[: self._going]

    def _filled(self, rows: Tensor) -> Tensor:
        """As many as there were in the beginning; the last one stands for those that have ended."""
        return torch.cat([rows, rows[-1:].expand(len(self.prompts) - len(rows))])

    def _hidden(self, state: dict[str, Tensor]) -> Tensor:
        assert isinstance(self._cache, FixedCache)
        return (_step() if self._cache.layers else _run)(self.model, state, self._cache)


def check_compiled(model: GPT | EncoderDecoder) -> None:
    """Raises `UserError` for what cannot be compiled here."""
    if not isinstance(model, GPT):
        raise UserError("compile: an encoder-decoder's steps are not compiled: leave it out")
    if not has_compiler(next(model.parameters()).device):
        raise UserError("compile on CPU needs a C++ compiler: install one (`apt-get install g++`), or leave it out")


def _run(model: GPT | EncoderDecoder, state: dict[str, Tensor], cache: FixedCache) -> Tensor:
    hidden: Tensor = model(state, cache=cache)["hidden"]
    return hidden


@functools.cache
def _step() -> Callable[[GPT | EncoderDecoder, dict[str, Tensor], FixedCache], Tensor]:
    return torch.compile(_run, dynamic=False)
