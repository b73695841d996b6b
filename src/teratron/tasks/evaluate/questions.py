"""Multiple choice from files: the published shapes of HellaSwag, ARC, OpenBookQA, PIQA, BoolQ and RACE, and a plain one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teratron.config import UserError
from teratron.tasks.evaluate.records import is_table, read_rows, read_text
from teratron.tasks.finetune.rows import Row


@dataclass(frozen=True)
class Question:
    """What is read, what may come behind it, and which of that is right."""

    context: str
    choices: tuple[str, ...]
    """Each with the space before it."""
    gold: int


def read_questions(file: Path) -> list[Question]:
    """The questions of a table in any shape of `SHAPES`, or of a .txt file: six lines each, a beginning, the number of the right
    ending, four endings. Raises `UserError` that names the example and what it holds.
    """
    if not is_table(file):
        return _of_six_lines(file)
    questions: list[Question] = []
    for number, row in enumerate(read_rows(file), 1):
        where = f"--data {file}, example {number}"
        shape = next((make for keys, make in SHAPES if keys <= row.keys()), None)
        if shape is None:
            shapes = "; ".join(", ".join(sorted(keys)) for keys, _ in SHAPES)
            raise UserError(f"{where}: found the columns {', '.join(map(str, row)) or '(none)'}; expected one of these sets: {shapes}")
        try:
            found = list(shape(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: not as its columns let expect ({type(error).__name__}: {error}): compare it with the data set's own"
            ) from None
        questions += [_checked(question, where) for question in found]
    return questions


def _checked(question: Question, where: str) -> Question:
    if len(question.choices) < 2 or not 0 <= question.gold < len(question.choices):
        raise UserError(
            f"{where}: the right choice is number {question.gold} of {len(question.choices)}: expected at least two choices, counted from 0"
        )
    return question


def _of_six_lines(file: Path) -> list[Question]:
    lines = read_text(file).rstrip("\n").split("\n")
    questions = []
    for start in range(0, len(lines), 6):
        context, gold, *endings = lines[start : start + 6] if len(lines) >= start + 6 else ("", "", "")
        if len(endings) != 4 or not gold.strip().isdecimal():
            raise UserError(
                f"--data {file}, line {start + 1}: expected six lines each: a beginning, the number of the right ending (0 to 3), four "
                "endings; or give a .jsonl file"
            )
        questions.append(_checked(Question(context, _spaced(endings), int(gold)), f"--data {file}, line {start + 1}"))
    return questions


def _plain(row: Row) -> Iterator[Question]:
    query = row["query"].rstrip()
    asked = query.startswith(("Question:", "Passage:"))
    yield Question(query + "\nAnswer:" * asked, _spaced(row["choices"]), int(row["gold"]))


def _hellaswag(row: Row) -> Iterator[Question]:
    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    yield Question(_clean(begun), _spaced(map(_clean, row["endings"])), int(row["label"]))


def _clean(text: str) -> str:
    """Without the marks that HellaSwag's source WikiHow has left in it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _arc(row: Row) -> Iterator[Question]:
    question, key = row["question"], row["answerKey"]
    if isinstance(question, dict):
        stem, options = question["stem"], question["choices"]
        labels, texts = [option["label"] for option in options], [option["text"] for option in options]
    else:
        stem, labels, texts = question, row["choices"]["label"], row["choices"]["text"]
    yield _asked(stem, texts, labels.index(key))


def _piqa(row: Row) -> Iterator[Question]:
    yield _asked(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def _boolq(row: Row) -> Iterator[Question]:
    asked = f"{row['passage']}\nQuestion: {row['question'].rstrip('?')}?\nAnswer:"
    yield Question(asked, (" no", " yes"), int(row["answer"]))


def _race(row: Row) -> Iterator[Question]:
    if isinstance(row["questions"], str):
        rows = [(row["questions"], row["options"], row["answers"])]
    else:
        rows = list(zip(row["questions"], row["options"], row["answers"], strict=True))
    for question, options, answer in rows:
        asked = f"Article: {row['article']}\n\nQuestion: {question}\nAnswer:"
        yield Question(asked, _spaced(options), "ABCD".index(answer))


def _race_flat(row: Row) -> Iterator[Question]:
    yield from _race({**row, "questions": row["question"], "answers": row["answer"]})


def _asked(question: str, choices: list[str], gold: int) -> Question:
    return Question(f"Question: {question}\nAnswer:", _spaced(choices), gold)


def _spaced(choices: Any) -> tuple[str, ...]:
    return tuple(f" {choice.strip()}" for choice in choices)


SHAPES: list[tuple[frozenset[str], Callable[[Row], Iterator[Question]]]] = [
    (frozenset({"query", "choices", "gold"}), _plain),
    (frozenset({"activity_label", "ctx_a", "ctx_b", "endings", "label"}), _hellaswag),
    (frozenset({"question", "answerKey"}), _arc),
    (frozenset({"goal", "sol1", "sol2", "label"}), _piqa),
    (frozenset({"passage", "question", "answer"}), _boolq),
    (frozenset({"article", "questions", "options", "answers"}), _race),
    (frozenset({"article", "question", "options", "answer"}), _race_flat),
]
"""The columns that tell a shape, and what makes questions of a row."""
