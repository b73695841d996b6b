"""`answer`: the span of a text that answers a question, or that there is none (SQuAD)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from teratron.config import Config, UserError
from teratron.data.examples import Example
from teratron.models import Model
from teratron.objectives.compared import pointed
from teratron.tasks.finetune.coder import Coder, Framed
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import Scored, Task, forward, text_of
from teratron.tasks.metrics import Metric, exact_match, normalise_answer, span_f1

LONGEST = 30
"""Words of the longest answer that is predicted."""
NONE = "(no answer)"
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
"""Words, signs of punctuation, and characters of scripts without spaces."""


@dataclass(frozen=True)
class Piece:
    """A question and a stretch of its context in a frame."""

    row: int
    words: range
    """Numbers of the context's words."""
    framed: Framed
    places: np.ndarray
    """Where the token is that stands for each, and behind them the mark, which stands for no answer."""


class Answer(Task):
    """An answer begins and ends with words of its context; a piece of a long context that lacks it has none."""

    name = "answer"
    summary = "the span of a text that answers a question, or none; long texts by pieces with --stride"
    families = ("encoder", "gpt", "xlnet")
    takes = ("stride",)
    objective = "pointing"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "document"),
        "answers": ("answers", "answer"),
    }

    @classmethod
    def read(cls, table: Table) -> Table:
        rows = []
        for number, row in enumerate(table.rows, 1):
            where = f"{table.name}, example {number}"
            texts = {role: text_of(row, role, where) for role in ("question", "context")}
            rows.append(texts | {"answers": answers_of(row["answers"], texts["context"], where)})
        return Table(table.name, rows, table.notes)

    def learn(self, rows: Sequence[Row]) -> None:
        empty = sum(not row["answers"] for row in rows)
        if empty == len(rows):
            raise UserError("--data: no question has an answer: expected some; name their column with --columns answers=COLUMN")
        self.facts = {"unanswered": empty}

    def keys(self) -> dict[str, object]:
        return {"model.head": "classes", "model.classes": 2}

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        spans, found, read = [_span(row) for row in rows], [], set()
        for piece in self._pieces(rows, coder):
            first, last = spans[piece.row] or (-1, -1)
            if first in piece.words and last in piece.words:
                read.add(piece.row)
                found.append(self._example(piece, first - piece.words.start, last - piece.words.start, coder))
            else:
                found.append(self._example(piece, -1, -1, coder))
        self._lost = sum(span is not None for span in spans) - len(read)
        return found

    def notes(self) -> list[str]:
        if not self._lost:
            return []
        more = "" if self.options.stride else ": --stride N cuts long texts into pieces"
        return [f"{self._lost:,} answers are in no piece of {self.options.length} tokens{more}"]

    def _pieces(self, rows: Sequence[Row], coder: Coder) -> Iterator[Piece]:
        questions = coder.encode([row["question"] for row in rows])
        for number, (row, question) in enumerate(zip(rows, questions, strict=True)):
            question = question[: (coder.length - 3) // 2]
            spans = word_spans(row["context"])
            apart = [start > 0 and row["context"][start - 1].isspace() for start, _ in spans]
            words = coder.words([row["context"][start:stop] for start, stop in spans], apart)
            for piece in words.pieces(coder.length - coder.frame - 1 - len(question), self.options.stride):
                framed = coder.framed(question, words.cut(piece))
                yield Piece(number, piece, framed, np.append(framed.starts[1] + words.places(piece), framed.mark))

    @staticmethod
    def _example(piece: Piece, first: int, last: int, coder: Coder) -> Example:
        """first, last: which of the piece's places are right; -1 = the mark."""
        fields = coder.fields(piece.framed)
        fields["candidates"] = np.zeros(len(fields["tokens"]), np.int64)
        fields["candidates"][piece.places] = 1
        for name, place in (("first_weights", first), ("second_weights", last)):
            fields[name] = np.zeros(len(fields["tokens"]))
            fields[name][piece.places[place]] = 1
        return fields

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[str]:
        """The text of the likeliest span of all pieces; "" where every piece says that there is none."""
        pieces = list(self._pieces(rows, coder))
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(rows)
        none = np.full(len(rows), np.inf if self.facts["unanswered"] else -np.inf)
        examples = [self._example(piece, -1, -1, coder) for piece in pieces]
        for numbers, batch, state in forward(model, config, examples, self.batch):
            scores = pointed(model, state, batch["candidates"]).double().log_softmax(1).cpu().numpy()
            for number, of_tokens in zip(numbers, scores, strict=True):
                piece = pieces[number]
                score, first, last = best_span(*of_tokens[piece.places[:-1]].T)
                best[piece.row] = max(best[piece.row], (score, piece.words[first], piece.words[last]))
                none[piece.row] = min(none[piece.row], of_tokens[piece.framed.mark].sum())
        found = zip(rows, best, none, strict=True)
        return ["" if nothing >= score else _text(row["context"], first, last) for row, (score, first, last), nothing in found]

    def score(self, rows: Sequence[Row], predictions: Sequence[str]) -> Scored:
        gold = [[text for text, _ in row["answers"]] for row in rows]
        exact, shared = (
            np.array([score(guess, right) for guess, right in zip(predictions, gold, strict=True)]) for score in (exact_match, span_f1)
        )
        shown = [f"{row['question']} | {row['context']}" for row in rows]
        told = [" / ".join(dict.fromkeys(right)) or NONE for right in gold]
        return Scored([Metric.mean("exact_match", exact), Metric.mean("f1", shared)], shown, [p or NONE for p in predictions], told, shared)

    def baseline(self, rows: Sequence[Row]) -> Sequence[str]:
        """Of each context the sentence that shares most words with the question."""
        return [_nearest(row["question"], row["context"]) for row in rows]


def answers_of(value: Any, context: str, where: str) -> list[tuple[str, int]]:
    """The texts of a column's answers, and where each begins in the context; none where it is empty.

    value: one text or several, or objects as SQuAD has them, with `text` and `answer_start`. Raises `UserError` for an answer that is
    not in the context.
    """
    found = []
    for text, start in _given(value):
        if not isinstance(text, str) or not isinstance(start, (int, type(None))):
            raise UserError(
                f"{where}: an answer is {text!r} at {start!r}: expected a text and, if it is known, the character where it begins"
            )
        if text.strip():
            found.append((text, _start(text, start, context, where)))
    return found


def _given(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        texts, starts = (_listed(value.get(name)) for name in ("text", "answer_start"))
        yield from itertools.zip_longest(texts, starts)
        return
    for item in _listed(value):
        if isinstance(item, dict):
            yield item.get("text"), item.get("answer_start")
        else:
            yield item if isinstance(item, tuple) else (item, None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _start(text: str, start: int | None, context: str, where: str) -> int:
    place = context.find(text)
    if place < 0:
        raise UserError(f"{where}: the answer {text!r} is not in its context, word for word: correct it, or leave the example out")
    if start is None:
        return place
    if start < 0 or context[start : start + len(text)] != text:
        raise UserError(f"{where}: the answer {text!r} does not begin at character {start} of its context: expected {place}; correct it")
    return start


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where words begin and end, in characters; a text without any is one word."""
    return [found.span() for found in WORD.finditer(text)] or [(0, len(text))]


def _span(row: Row) -> tuple[int, int] | None:
    """The first and the last word of a row's first answer; None = it has none."""
    if not row["answers"]:
        return None
    text, start = row["answers"][0]
    begins, ends = np.array(word_spans(row["context"])).T
    first = int(np.searchsorted(ends, start, "right"))
    last = int(np.searchsorted(begins, start + len(text))) - 1
    return (first, last) if first <= last else None


def _text(context: str, first: int, last: int) -> str:
    spans = word_spans(context)
    return context[spans[first][0] : spans[last][1]]


def best_span(begins: np.ndarray, ends: np.ndarray) -> tuple[float, int, int]:
    """The likeliest span of at most `LONGEST` words, by its first and its last word's log-probabilities: (score, first, last)."""
    scores = np.where(np.triu(np.tri(len(begins), k=LONGEST - 1)) > 0, begins[:, None] + ends, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(first), int(last)


def _nearest(question: str, context: str) -> str:
    sentences = [part for part in re.split(r"(?<=[.!?\u3002])\s*", context) if part]
    asked = set(normalise_answer(question).split())
    return max(sentences, key=lambda text: len(asked & set(normalise_answer(text).split())), default="")
