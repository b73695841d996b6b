"""Multiple choice by likelihood: the model chooses what it finds likeliest behind the question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from teratron.tasks.evaluate.likelihood import Scorer
from teratron.tasks.evaluate.questions import Question, read_questions
from teratron.tasks.evaluate.task import SHOWN, Mistake, Options, Score
from teratron.tasks.metrics import Metric, calibration_error


class Choice:
    """multiple choice by likelihood: HellaSwag, ARC, OpenBookQA, PIQA, BoolQ, RACE, or lines of query, choices, gold"""

    def __init__(self, options: Options) -> None:
        self.cut = 0

    def read(self, file: Path, scorer: Scorer) -> list[Question]:
        return read_questions(file)

    def run(self, scorer: Scorer, examples: Sequence[Question], done: Callable[[float], None]) -> list[np.ndarray]:
        """The log-probability of each choice."""
        requests = [scorer.pair(question.context, choice) for question in examples for choice in question.choices]
        self.cut = scorer.count_cut(requests)
        found = iter(scorer.likelihoods(requests, done))
        return [np.array([one.total for one in itertools.islice(found, len(question.choices))]) for question in examples]

    def score(self, examples: Sequence[Question], answers: Sequence[np.ndarray]) -> Score:
        """accuracy: of the likeliest choice; accuracy_norm: of the likeliest by the character, as lm-eval has it."""
        gold = np.array([question.gold for question in examples])
        sizes = [np.array([len(choice) - 1 for choice in question.choices]) for question in examples]
        plain = np.array([scores.argmax() for scores in answers])
        normed = np.array([(scores / np.maximum(size, 1)).argmax() for scores, size in zip(answers, sizes, strict=True)])
        sure = np.array([_softmax(scores).max() for scores in answers])
        right = plain == gold
        metrics = [Metric.mean("accuracy", right), Metric.mean("accuracy_norm", normed == gold)]
        metrics.append(Metric("calibration_error", lambda chosen: calibration_error(sure[chosen], right[chosen])))
        missed = sorted(np.flatnonzero(~right).tolist(), key=lambda n: -sure[n])
        wrong = [self._mistake(examples[n], answers[n], int(plain[n])) for n in missed[:SHOWN]]
        facts: dict[str, str | int | float] = {"chance": float(np.mean([1 / len(question.choices) for question in examples]))}
        if self.cut:
            facts["texts cut on the left"] = self.cut
        return Score(metrics, len(examples), wrong, len(missed), facts)

    def _mistake(self, question: Question, scores: np.ndarray, chosen: int) -> Mistake:
        shares = _softmax(scores)
        expected, found = (f"{question.choices[n].strip()} ({shares[n] * 100:.0f}\N{NO-BREAK SPACE}%)" for n in (question.gold, chosen))
        return Mistake(question.context, expected, found)


def _softmax(scores: np.ndarray) -> np.ndarray:
    exps = np.exp(scores - scores.max())
    return exps / exps.sum()
