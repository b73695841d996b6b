"""LAMBADA (Paperno et al. 2016): the last word of a passage that only the whole passage tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teratron.config import UserError
from teratron.tasks.evaluate.likelihood import Likelihood, Scorer
from teratron.tasks.evaluate.records import read_rows, texts_under
from teratron.tasks.evaluate.task import SHOWN, Mistake, Options, Score
from teratron.tasks.metrics import Metric


@dataclass(frozen=True)
class Passage:
    """A text and its last word, the space before it with the word."""

    context: str
    word: str


class Lambada:
    """the last word of each passage, teacher-forced: right when all its tokens are the likeliest"""

    def __init__(self, options: Options) -> None:
        self.cut = 0
        self.guesses: list[str] = []

    def read(self, file: Path, scorer: Scorer) -> list[Passage]:
        """A table with the passage in its column `text`."""
        passages = []
        for number, text in enumerate(texts_under(read_rows(file), "text", file), 1):
            context, space, word = text.rstrip().rpartition(" ")
            if not context.strip():
                raise UserError(f"--data {file}, example {number}: '{word}' is a single word, expected a passage and its last word")
            passages.append(Passage(context, space + word))
        return passages

    def run(self, scorer: Scorer, examples: Sequence[Passage], done: Callable[[float], None]) -> list[Likelihood]:
        requests = [scorer.pair(passage.context, passage.word) for passage in examples]
        self.cut = scorer.count_cut(requests)
        found = scorer.likelihoods(requests, done)
        self.guesses = [scorer.frame.tokenizer.decode(likelihood.guess) for likelihood in found]
        return found

    def score(self, examples: Sequence[Passage], answers: Sequence[Likelihood]) -> Score:
        logs, right = np.array([answer.total for answer in answers]), [answer.greedy for answer in answers]
        perplexity = Metric("perplexity", lambda chosen: math.exp(min(700.0, -float(logs[chosen].mean()))))
        missed = sorted(np.flatnonzero(~np.array(right)).tolist(), key=lambda n: -logs[n])
        wrong = [Mistake(examples[n].context, examples[n].word.strip(), self.guesses[n].strip()) for n in missed[:SHOWN]]
        facts: dict[str, str | int | float] = {"passages cut on the left": self.cut} if self.cut else {}
        return Score([Metric.mean("accuracy", right), perplexity], len(examples), wrong, len(missed), facts)
