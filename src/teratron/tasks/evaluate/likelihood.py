"""How likely a model finds a text behind another: what perplexity, LAMBADA, multiple choice and lm-eval all ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teratron.checkpoint import LoadedModel
from teratron.config import ModelConfig, UserError
from teratron.generate.cache import KVCache
from teratron.generate.complete import tokenizer_of
from teratron.generate.frame import Frame, frame_of
from teratron.models import State
from teratron.models.head import CHUNK_LOGITS
from teratron.models.leaves import accurate

Progress = Callable[[float], None]
"""Told which further share of the work is done."""


@dataclass(frozen=True)
class Request:
    """Token ids: what is read, and what is scored behind it. Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation, each token given all before it."""

    total: float
    """Sum of the tokens' log-probabilities, in nats."""
    guess: tuple[int, ...]
    """The likeliest token at each place."""
    greedy: bool
    """Whether that is the continuation."""


def rolling(tokens: Sequence[int], prefix: int, length: int, stride: int) -> Iterator[Request]:
    """Windows of `length` tokens that together score each token once: the first all its own, the others
    their last `stride`, as Megatron-LM evaluates.

    prefix: the token in front of the text, of which the first window alone sees something.
    """
    whole = [prefix, *tokens]
    scored = 0
    while scored < len(tokens):
        end = min(scored + (stride if scored else length), len(tokens))
        yield Request(whole[max(0, end - length) : scored + 1], tokens[scored:end])
        scored = end


class Scorer:
    """Texts as one model reads them (`Frame`), and how likely it finds them; `likelihoods` is the business of subclasses."""

    def __init__(self, config: ModelConfig, frame: Frame, name: str, device: torch.device) -> None:
        """name: of the model, for messages. Raises `UserError` for a model that gives texts no probability."""
        if config.family not in ("gpt", "encoder_decoder"):
            raise UserError(
                f"{name}: model.family = {config.family} gives a text no probability, as it sees both sides of each token: choose a "
                "model of model.family = gpt or encoder_decoder"
            )
        if config.head != "language":
            raise UserError(
                f"{name}: model.head = {config.head}: was fine-tuned for another task and gives texts no probability: evaluate that one"
            )
        self.config, self.frame, self.name, self.device = config, frame, name, device

    @property
    def first(self) -> int | None:
        """The token before a text's first: bos, else eod; None = there is none."""
        return self.frame.tokenizer.eod if self.frame.tokenizer.bos is None else self.frame.tokenizer.bos

    def pair(self, context: str, continuation: str) -> Request:
        """A text cut in two as tokens. White space at the end of the context goes to the continuation, whose first token may hold it."""
        if self.frame.after:
            return Request(self.frame.read(context), self.frame.tokenizer.encode(continuation))
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        read = self.frame.read(kept)
        return Request(read, self.frame.read(kept + continuation)[len(read) :] if kept else self.frame.tokenizer.encode(continuation))

    def count_cut(self, requests: Sequence[Request]) -> int:
        """How many requests lose the beginning of their context because the model has too few positions."""
        return sum(self._room(request) < len(request.context) for request in requests)

    def likelihoods(self, requests: Sequence[Request], done: Progress = lambda share: None) -> list[Likelihood]:
        """The likelihood of each request. A context that is too long for the model's positions loses its beginning.

        Raises `UserError` for a continuation that is too long by itself, and for ids that the model does not have.
        """
        raise NotImplementedError

    def check(self, requests: Sequence[Request]) -> None:
        """Raise `UserError` for requests that cannot be scored."""
        for request in requests:
            self._check(request)

    def _check(self, request: Request) -> None:
        if not request.context or not request.continuation:
            raise UserError("a text to score has no tokens: leave empty texts out of the data")
        if self._room(request) < 1:
            raise UserError(
                f"a text to score has {len(request.continuation):,} tokens and the model {self.config.positions:,} positions: shorten the "
                "texts"
            )
        for token in (edge((*request.context, *request.continuation)) for edge in (min, max)):
            if not 0 <= token < self.config.vocab_size:
                raise UserError(
                    f"the tokenizer gives token {token}, but {self.name} has ids 0 to {self.config.vocab_size - 1}: use the "
                    "tokenizer that the model was trained with (--tokenizer FILE)"
                )

    def _room(self, request: Request) -> int:
        """Tokens of context that the model has positions for."""
        if self.frame.start is not None:
            return self.config.positions if len(request.continuation) <= self.config.positions else 0
        return self.config.positions + 1 - len(request.continuation)

    def inputs(self, requests: Sequence[Request]) -> tuple[State, Tensor, Tensor]:
        """The model's first state, the targets [B, S], and where they are scored, bool [B, S]. Padding stands behind."""
        contexts = [list(request.context)[-self._room(request) :] for request in requests]
        ends = [list(request.continuation) for request in requests]
        if self.frame.start is not None:
            read, real = _padded(contexts, self.device)
            written, scored = _padded([[self.frame.start, *end] for end in ends], self.device)
            state = {"encoder_tokens": read, "encoder_segments": real.long() - 1, "encoder_positions": _places(read)}
            return state | {"tokens": written[:, :-1], "positions": _places(written[:, :-1])}, written[:, 1:], scored[:, 1:]
        tokens, real = _padded([context + end for context, end in zip(contexts, ends, strict=True)], self.device)
        behind = _places(tokens) >= torch.tensor([len(context) for context in contexts], device=self.device)[:, None]
        state = {"tokens": tokens[:, :-1], "positions": _places(tokens[:, :-1]), "real": real[:, :-1]}
        if self.frame.both_sides:
            state["prefix"] = ~behind[:, :-1]
        return state, tokens[:, 1:], (real & behind)[:, 1:]


class ModelScorer(Scorer):
    """Scores with an opened model."""

    def __init__(self, loaded: LoadedModel, batch: int = 16) -> None:
        """batch: requests of about one length that go through the model together; it changes the numbers by no more than rounding."""
        self.loaded, self.batch = loaded, batch
        frame = frame_of(loaded.config.family, loaded.objective, tokenizer_of(loaded))
        super().__init__(loaded.config, frame, loaded.name, next(loaded.model.parameters()).device)

    def likelihoods(self, requests: Sequence[Request], done: Progress = lambda share: None) -> list[Likelihood]:
        self.check(requests)
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n].context) - len(requests[n].continuation))
        found: dict[int, Likelihood] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            found.update(zip(chosen, self._batch([requests[number] for number in chosen]), strict=True))
            done(len(chosen) / len(order))
        return [found[number] for number in range(len(requests))]

    def _batch(self, requests: Sequence[Request]) -> list[Likelihood]:
        state, targets, scored = self.inputs(requests)
        with torch.inference_mode():
            # As in generation no token is dropped for want of capacity: later tokens would have a say in it.
            cache = KVCache(targets.shape[1]) if self.config.capacity and self.frame.start is None else None
            hidden_TH = self.loaded.model(state, cache=cache)["hidden"][scored]
            logs, guesses = self._score(hidden_TH, targets[scored])
        result, start = [], 0
        for request in requests:
            part = slice(start, start := start + len(request.continuation))
            guess = tuple(guesses[part].tolist())
            result.append(Likelihood(float(logs[part].sum()), guess, guess == tuple(request.continuation)))
        return result

    def _score(self, hidden_TH: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, float64 [T], and the likeliest token, int64 [T]; logits exist for a few tokens at a time."""
        rows = max(1, CHUNK_LOGITS // self.config.vocab_size)
        logs, guesses = [], []
        for hidden, targets in zip(hidden_TH.split(rows), targets_T.split(rows), strict=True):
            logits = self.loaded.model.head.output(hidden[None])[0]
            logits = logits.to(accurate(logits.dtype))
            logs.append((logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)).double())
            guesses.append(logits.argmax(-1))
        return torch.cat(logs).cpu(), torch.cat(guesses).cpu()


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows as one tensor int64 [B, S], and which of it is no padding."""
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return tokens, torch.arange(width, device=device) < lengths


def _places(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
