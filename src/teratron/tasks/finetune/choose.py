"""`choose`: which of several choices answers a question, all compared in one example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from teratron.config import Config, UserError
from teratron.data.examples import Example, side_by_side
from teratron.models import Model
from teratron.objectives.compared import pointed
from teratron.tasks.finetune.coder import Coder, Framed
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import Scored, Task, forward, text_of
from teratron.tasks.metrics import Metric

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Choose(Task):
    """Every choice stands with its question in a segment of the example, and none sees another; their marks are the candidates."""

    name = "choose"
    summary = "the right one of several choices"
    families = ("encoder", "gpt", "xlnet")
    objective = "pointing"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {
        "question": ("question", "query", "ctx", "prompt", "text", "goal"),
        "choices": ("choices", "options", "endings"),
        "answer": ("answer", "gold", "label", "answerKey"),
    }

    @classmethod
    def read(cls, table: Table) -> Table:
        rows = []
        for number, row in enumerate(table.rows, 1):
            where = f"{table.name}, example {number}"
            choices, names = choices_of(row["choices"], where)
            answer = number_of(row["answer"], choices, names, where)
            rows.append({"question": text_of(row, "question", where), "choices": choices, "answer": answer})
        return Table(table.name, rows, table.notes)

    def learn(self, rows: Sequence[Row]) -> None:
        counts = Counter(row["answer"] for row in rows)
        self.facts = {"counts": [counts[number] for number in range(max(counts) + 1)]}

    def keys(self) -> dict[str, object]:
        return {"model.head": "classes", "model.classes": 1}

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        self._cut = 0
        return [self._example(row, segments, coder) for row, segments in zip(rows, self._segments(rows, coder), strict=True)]

    def notes(self) -> list[str]:
        return [f"{self._cut:,} questions lost their beginning to fit into {self.options.length} tokens"] if self._cut else []

    def _segments(self, rows: Sequence[Row], coder: Coder) -> list[list[Framed]]:
        """The question with each choice, framed."""
        questions = coder.encode([row["question"] for row in rows])
        choices = coder.encode([choice for row in rows for choice in row["choices"]])
        found, room = [], coder.length - coder.frame - 1
        for row, question in zip(rows, questions, strict=True):
            own, choices = [ids[: room // 2] for ids in choices[: len(row["choices"])]], choices[len(row["choices"]) :]
            left = room - max(map(len, own))
            self._cut += len(question) > left
            found.append([coder.framed(question[-left:], choice) for choice in own])
        return found

    @staticmethod
    def _example(row: Row, segments: Sequence[Framed], coder: Coder) -> Example:
        lengths = [len(segment.tokens) for segment in segments]
        fields = side_by_side([coder.fields(segment) for segment in segments])
        marks = np.cumsum([0, *lengths[:-1]]) + [segment.mark for segment in segments]
        fields["candidates"] = np.isin(np.arange(sum(lengths)), marks).astype(np.int64)
        return fields | {"first_weights": (np.arange(sum(lengths)) == marks[row["answer"]]).astype(float)}

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[int]:
        """The number of the likeliest choice, from 0."""
        examples, found = self.examples(rows, coder), np.zeros(len(rows), np.int64)
        for numbers, batch, state in forward(model, config, examples, self.batch):
            best = pointed(model, state, batch["candidates"])[..., 0].argmax(1, keepdim=True)
            found[numbers] = batch["segments"].gather(1, best)[:, 0].cpu().numpy()
        return found.tolist()

    def score(self, rows: Sequence[Row], predictions: Sequence[int]) -> Scored:
        gold = [row["answer"] for row in rows]
        good = (np.array(predictions) == gold).astype(float)
        shown = [" | ".join([row["question"], *row["choices"]]) for row in rows]
        guessed, told = ([row["choices"][number] for row, number in zip(rows, side, strict=True)] for side in (predictions, gold))
        return Scored([Metric.mean("accuracy", good)], shown, guessed, told, good)

    def baseline(self, rows: Sequence[Row]) -> Sequence[int]:
        """The place at which the right choice stood most often in training."""
        counts = np.array(self.facts["counts"])
        return [int(counts[: len(row["choices"])].argmax()) for row in rows]


def choices_of(value: Any, where: str) -> tuple[list[str], list[str]]:
    """The choices and their names, which are letters unless the data says others (as ARC's `label`)."""
    texts = value.get("text") if isinstance(value, dict) else value
    names = value.get("label", LETTERS) if isinstance(value, dict) else LETTERS
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, (str, int, float)) for text in texts):
        raise UserError(
            f"{where}: its choices are {str(value)[:60]!r}: expected a list of two texts at least; name it with --columns choices=COLUMN"
        )
    return [str(text) for text in texts], [str(name) for name in names]


def number_of(answer: Any, choices: Sequence[str], names: Sequence[str], where: str) -> int:
    """Which choice an answer means, from 0: a text or the name of a choice, or its number."""
    for known in (choices, names[: len(choices)]):
        if isinstance(answer, str) and list(known).count(answer) == 1:
            return list(known).index(answer)
    number = int(answer) if isinstance(answer, int) or str(answer).isdecimal() else -1
    if not 0 <= number < len(choices):
        raise UserError(
            f"{where}: its answer {answer!r} is none of {len(choices)} choices: expected a number from 0 to {len(choices) - 1}, a letter "
            f"from {names[0]} to {names[len(choices) - 1]}, or a choice's own text"
        )
    return number
