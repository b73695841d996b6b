"""Perplexity of texts, by windows that slide over each document."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teratron.config import UserError
from teratron.tasks.evaluate.likelihood import Likelihood, Request, Scorer, rolling
from teratron.tasks.evaluate.records import is_table, read_rows, read_text, texts_under
from teratron.tasks.evaluate.task import SHOWN, Mistake, Options, Score
from teratron.tasks.evaluate.wikitext import join_words
from teratron.tasks.metrics import Metric, Text, perplexities

DETOKENISERS: dict[str, Callable[[str], str]] = {"": str, "wikitext": join_words}


@dataclass(frozen=True)
class Window:
    """A stretch of a document."""

    request: Request
    text: str
    """Of the tokens that are scored."""


class Perplexity:
    """of the texts of a file, by the token, the word and the byte"""

    def __init__(self, options: Options) -> None:
        if options.detokenise not in DETOKENISERS:
            raise UserError(f"--detokenise {options.detokenise}: expected {' or '.join(filter(None, DETOKENISERS))}")
        if options.stride < 0:
            raise UserError(f"--stride {options.stride}: expected tokens, 1 or more; 0 = half a window")
        self.options = options

    def read(self, file: Path, scorer: Scorer) -> list[Window]:
        """A table has a document a row, in its column `text`; any other file is one document."""
        if scorer.frame.after:
            raise UserError(
                f"{scorer.name}: reads a text before it writes one, so a whole text has no perplexity: choose choice or lambada"
            )
        texts = texts_under(read_rows(file), "text", file) if is_table(file) else [read_text(file)]
        texts = [text for text in texts if text.strip()]
        self.length = scorer.config.seq_length
        self.stride = self.options.stride or max(1, self.length // 2)
        if self.stride > self.length:
            raise UserError(f"--stride {self.stride}: the model's windows have {self.length} tokens: expected at most as many")
        windows = [window for text in texts for window in self._windows(DETOKENISERS[self.options.detokenise](text), scorer)]
        if not windows:
            raise UserError(f"--data {file}: has no text to score: expected at least two tokens")
        tokens = sum(len(window.request.continuation) for window in windows)
        self.text = Text(tokens, sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts))
        return windows

    def _windows(self, text: str, scorer: Scorer) -> list[Window]:
        tokenizer, first = scorer.frame.tokenizer, scorer.first
        tokens = tokenizer.encode(text)
        if first is None:  # then the first token has nothing before it, and no probability
            first, tokens = (tokens[0], tokens[1:]) if tokens else (0, [])
        requests = rolling(tokens, first, self.length, self.stride)
        return [Window(request, tokenizer.decode(request.continuation)) for request in requests]

    def run(self, scorer: Scorer, examples: Sequence[Window], done: Callable[[float], None]) -> list[Likelihood]:
        return scorer.likelihoods([window.request for window in examples], done)

    def score(self, examples: Sequence[Window], answers: Sequence[Likelihood]) -> Score:
        losses = np.array([-answer.total for answer in answers])
        tokens = np.array([len(window.request.continuation) for window in examples])
        facts: dict[str, str | int | float] = {"tokens": int(tokens.sum()), "window": self.length, "stride": self.stride}
        facts |= {"words per token": self.text.words / self.text.tokens, "bytes per token": self.text.bytes / self.text.tokens}
        if self.options.detokenise:
            facts["detokenised"] = self.options.detokenise
        hardest = np.argsort(-losses / tokens, kind="stable")[:SHOWN]
        wrong = [Mistake(examples[n].text, "", f"perplexity {math.exp(min(700, losses[n] / tokens[n])):,.1f}") for n in hardest]
        return Score(self._metrics(losses, tokens), len(examples), wrong, facts=facts)

    def _metrics(self, losses: np.ndarray, tokens: np.ndarray) -> list[Metric]:
        """Words and bytes are told by the tokens, at the rate of the whole file: a window may end inside a word."""

        def of(name: str, chosen: np.ndarray) -> float:
            share = float(tokens[chosen].sum()) / self.text.tokens
            return perplexities(float(losses[chosen].sum()) / share, self.text)[name]

        names = ["token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"]
        return [Metric(name, lambda chosen, name=name: of(name, chosen)) for name in names]  # type: ignore[misc]
