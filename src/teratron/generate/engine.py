"""The engine: continues a batch of token sequences of different lengths, one token a row and step, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from teratron.config import ModelConfig, UserError
from teratron.generate.cache import KVCache
from teratron.generate.sampler import Sampling, choose, uniform
from teratron.models import GPT, EncoderDecoder

DEFAULT_NEW_TOKENS = 100


def room_for(prompt: Sequence[int], config: ModelConfig, max_new_tokens: int | None) -> int:
    """How many new tokens a prompt gets: `max_new_tokens`, or with None DEFAULT_NEW_TOKENS as far as the positions reach.

    Raises `UserError` for a prompt that is empty or fills the model's positions, and for more new tokens than they leave.
    """
    if not prompt:
        raise UserError("the prompt has no tokens: a model continues at least one")
    # A decoder beside an encoder has all positions for what it writes.
    room = config.positions - (len(prompt) if config.family != "encoder_decoder" else 0)
    if len(prompt) >= config.positions:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens and the model {config.positions:,} positions: "
            f"shorten it to at most {config.positions - 1:,} tokens"
        )
    if max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    if max_new_tokens > room:
        raise UserError(
            f"max_new_tokens = {max_new_tokens:,}: after the prompt's {len(prompt):,} tokens "
            f"the model's {config.positions:,} positions leave {room:,}; ask for at most {room:,}"
        )
    return max_new_tokens


class TokenStream:
    """Iterates over steps, once; each gives (row, token) of the rows that got a token, in row order.

    A row ends at a token of `stop_ids` (which is not given out), after its number of new tokens, or when the reader calls `stop`.
    The tokens of a row do not depend on the other rows, up to rounding in the model's matrix products.

    Args:
        prompts: token ids, at least one a row; they are padded on the left, and the padding is never seen by a real token.
        seeds: one a row; None = `sampling.seed` for every row.
        vocab: ids at or above it are never chosen; None = the model's vocabulary.

    Raises `UserError` for what `room_for` refuses, and for an id that the model does not have.
    """

    def __init__(
        self,
        model: GPT | EncoderDecoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        vocab: int | None = None,
    ) -> None:
        if model.head is None:
            raise ValueError("generation needs a whole model, not a range of its units")
        self.output = model.head.output
        self.limits = [room_for(prompt, model.config, max_new_tokens) for prompt in prompts]
        for prompt in prompts:
            _check_ids(prompt, model.config.vocab_size)
        self.model, self.sampling, self.stop_ids = model, sampling, frozenset(stop_ids)
        self.prompts = prompts
        self.seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
        self.vocab = min(vocab or model.config.vocab_size, model.config.vocab_size)
        self.rows = list(range(len(prompts)))
        """The rows that go on, in the order of the batch."""
        self._ended: set[int] = set()

    def stop(self, row: int) -> None:
        """End a row before its limit; call it between steps."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if not self.rows:
            return
        hidden, place = self._prefill(), 0
        while True:
            chosen = self._choose(self._logits(hidden), place)
            place += 1
            step = list(zip(self.rows, chosen.tolist(), strict=True))
            self._ended.update(row for row, token in step if token in self.stop_ids or place == self.limits[row])
            yield [(row, token) for row, token in step if token not in self.stop_ids]
            going = [index for index, row in enumerate(self.rows) if row not in self._ended]
            if not going:
                return
            if len(going) < len(self.rows):
                kept = torch.tensor(going, device=chosen.device)
                self.rows, chosen = [self.rows[index] for index in going], chosen[kept]
                self._keep(kept)
            hidden = self._feed(chosen)

    def _choose(self, logits_BV: Tensor, place: int) -> Tensor:
        """New token number `place` (from 0) of each row, int64 [B]."""
        return choose(logits_BV, self.sampling, [uniform(self.seeds[row], place) for row in self.rows])

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        """Run all prompts in one pass; their hidden states [B, S, H]."""
        parameter = next(self.model.parameters())
        lengths = [len(prompt) for prompt in self.prompts]
        width = max(lengths)
        rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in self.prompts]
        tokens = torch.tensor(rows, device=parameter.device)
        padding = width - torch.tensor(lengths, device=parameter.device)[:, None]
        self._places = torch.arange(width, device=parameter.device) - padding
        self._cache = KVCache(width + max(self.limits))
        return self._forward(tokens, padded=min(lengths) < width)

    @torch.inference_mode()
    def _keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 [B'], ascending; one may come several times."""
        self._places = self._places[rows]
        self._cache.keep(rows)

    @torch.inference_mode()
    def _feed(self, tokens_B: Tensor) -> Tensor:
        """Hidden states [B, 1, H] of one more token of each row."""
        self._places = self._places[:, -1:] + 1
        return self._forward(tokens_B[:, None])

    def _forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """Places are those in a token's own sequence; padding comes before, below 0. Without it prompts are as in training."""
        state = {"tokens": tokens, "positions": self._places.clamp(min=0)}
        if padded:
            state["order"] = self._places
        return self.model(state, cache=self._cache)["hidden"]

    @torch.inference_mode()
    def _logits(self, hidden_BSH: Tensor) -> Tensor:
        """Scores [B, V] of what comes after the last token."""
        return self.output(hidden_BSH[:, -1])[:, : self.vocab]


def _check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"the prompt has token {token}, but the model's ids are 0 to {vocab_size - 1}: "
                "use the tokenizer that the model was trained with"
            )
