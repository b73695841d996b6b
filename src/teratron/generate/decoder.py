"""The decoder of a batch: reads prompts of different lengths in one pass, then a token more of every row, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teratron.config import ModelConfig, UserError
from teratron.generate.cache import FixedCache, KVCache
from teratron.models import GPT, EncoderDecoder

DEFAULT_NEW_TOKENS = 100


def room_for(prompt: Sequence[int], config: ModelConfig, max_new_tokens: int | None) -> int:
    """How many new tokens a prompt gets: `max_new_tokens`, or with None DEFAULT_NEW_TOKENS as far as the positions reach.

    Positions that are computed go on behind those that were trained, but only where `max_new_tokens` asks for it.
    Raises `UserError` for a prompt that is empty or fills the positions, and for more new tokens than they leave.
    """
    if not prompt:
        raise UserError("the prompt has no tokens: a model continues at least one")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    if max_new_tokens is not None and config.position != "learned":
        return max_new_tokens
    # A decoder beside an encoder has all positions for what it writes.
    taken, spare = (len(prompt), 1) if config.family != "encoder_decoder" else (0, 0)
    room = config.positions - taken
    if len(prompt) > config.positions - spare:
        further = "" if config.position == "learned" else ", or say with max_new_tokens how far to go beyond them"
        raise UserError(
            f"the prompt has {len(prompt):,} tokens and the model {config.positions:,} positions: "
            f"shorten it to at most {config.positions - spare:,} tokens{further}"
        )
    if max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if max_new_tokens > room:
        raise UserError(
            f"max_new_tokens = {max_new_tokens:,}: after the prompt's {len(prompt):,} tokens "
            f"the model's {config.positions:,} positions leave {room:,}; ask for at most {room:,}"
        )
    return max_new_tokens


class Decoder:
    """Rows of one batch; call `prefill` once, then `feed` for each new token.

    With `rewinds` tokens may come in place of others: see `put`. A row's hidden states do not depend on the other rows, up to rounding in
    the model's matrix products.
    """

    def __init__(
        self,
        model: GPT | EncoderDecoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        vocab: int | None = None,
        both_sides: bool = False,
        rewinds: bool = False,
    ) -> None:
        """A decoder of a `GPT`; for an encoder-decoder see `AnswerDecoder`.

        Args:
            prompts: token ids, at least one a row; they are padded on the left, and the padding is never seen by a real token.
            max_new_tokens: see `room_for`; `limits` has what each row gets.
            vocab: ids at or above it have no logits; None = the model's vocabulary.
            both_sides: every token of a prompt sees all of it, as in prefix language modelling.
            rewinds: tokens may be fed in place of others; every layer then has room for all tokens, also one with a window.

        Raises `UserError` for what `room_for` refuses, and for an id that the model does not have.
        """
        if model.head is None:
            raise ValueError("generation needs a whole model, not a range of its units")
        for prompt in prompts:
            _check_ids(prompt, model.config.vocab_size)
        self.model, self.prompts, self.both_sides, self.rewinds = model, prompts, both_sides, rewinds
        self.limits = [room_for(prompt, model.config, max_new_tokens) for prompt in prompts]
        self.vocab = min(vocab or model.config.vocab_size, model.config.vocab_size)
        self.device = next(model.parameters()).device

    def room(self, tokens: int) -> int:
        """Columns of a cache for so many tokens."""
        return tokens

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Run all prompts in one pass; their hidden states [B, S, H]."""
        lengths = [len(prompt) for prompt in self.prompts]
        width = max(lengths)
        rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in self.prompts]
        padding_B = width - torch.tensor(lengths, device=self.device)
        self._places = torch.arange(width, device=self.device) - padding_B[:, None]
        capacity = self.room(width + max(self.limits))
        self._cache: KVCache | FixedCache = FixedCache(capacity, padding_B) if self.rewinds else KVCache(capacity)
        return self._forward(torch.tensor(rows, device=self.device), padded=min(lengths) < width, prefix=self.both_sides)

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 [B'], in this order; one may come several times."""
        self._places = self._places[rows]
        self._cache.keep(rows)

    @torch.inference_mode()
    def feed(self, tokens_B: Tensor) -> Tensor:
        """Hidden states [B, 1, H] of one more token of each row."""
        self._places = self._places[:, -1:] + 1
        return self._forward(tokens_B[:, None])

    @torch.inference_mode()
    def put(self, tokens: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
        """Hidden states [B, S, H] of equally many tokens of each row, the first of which stand at `places`; needs `rewinds`.

        What a row had at these places and behind them is forgotten.
        """
        if not isinstance(self._cache, FixedCache):
            raise ValueError("only a decoder that rewinds puts tokens in place of others")
        tokens_BS = torch.tensor(tokens, device=self.device)
        self._places = torch.tensor(places, device=self.device)[:, None] + torch.arange(tokens_BS.shape[1], device=self.device)
        self._cache.used = int((self._places[:, -1:] + self._cache.padding_B1).max()) + 1
        return self._forward(tokens_BS)

    @torch.inference_mode()
    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """Scores [B, V] of what comes after the last token."""
        return self.all_logits(hidden_BSH[:, -1])

    @torch.inference_mode()
    def all_logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] of what comes after tokens of these hidden states [..., H]."""
        return self.model.head.output(hidden)[..., : self.vocab]

    def _forward(self, tokens: Tensor, padded: bool = True, prefix: bool = False) -> Tensor:
        """Places are those in a token's own sequence; padding comes before, below 0. Without it prompts are as in training."""
        state = {"tokens": tokens, "positions": self._places.clamp(min=0)}
        if padded:
            state["order"] = self._places
        if prefix:
            state["prefix"] = self._places >= 0
        return self._hidden(state)

    def _hidden(self, state: dict[str, Tensor]) -> Tensor:
        """Hidden states [B, S, H] of the tokens of a state, which go into the cache."""
        hidden: Tensor = self.model(state, cache=self._cache)["hidden"]
        return hidden


def _check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    for token in (min(prompt, default=0), max(prompt, default=0)):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"the prompt has token {token}, but the model's ids are 0 to {vocab_size - 1}: "
                "use the tokenizer that the model was trained with"
            )
