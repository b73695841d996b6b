"""Rows of fine-tuning: question answering and parallel text are read whole, and columns are found or named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from teratron.config import UserError
from teratron.tasks.finetune.answer import Answer
from teratron.tasks.finetune.rows import Table, find_columns, read_table


def test_squad_gives_a_row_a_question_with_or_without_answers(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "who?", "answers": [{"text": "owl", "answer_start": 4}, {"text": "the owl", "answer_start": 0}]},
        {"id": "2", "question": "where?", "is_impossible": True, "answers": []},
    ]
    content = {"version": "2", "data": [{"title": "x", "paragraphs": [{"context": "the owl", "qas": asked}] * 2}] * 2}
    with gzip.open(tmp_path / "squad.json.gz", "wt", encoding="utf-8") as file:
        json.dump(content, file)
    table = find_columns(read_table([tmp_path / "squad.json.gz"]), Answer.columns, {})
    rows = Answer.read(table).rows
    assert [row["question"] for row in rows] == ["who?", "where?"] * 4
    assert [row["answers"] for row in rows] == [[("owl", 4), ("the owl", 0)], []] * 4


def test_files_of_parallel_text_are_sources_and_then_targets(tmp_path: Path) -> None:
    lines = {"a.en": ["one", "two"], "b.en": ["three"], "a.de": ["eins", "zwei"], "b.de": ["drei"]}
    for name, content in lines.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in content), "utf-8")
    rows = read_table([tmp_path / name for name in lines], parallel=True).rows
    assert [(row["source"], row["target"]) for row in rows] == [("one", "eins"), ("two", "zwei"), ("three", "drei")]
    (tmp_path / "b.de").write_text("", "utf-8")
    with pytest.raises(UserError, match=r"3 lines in the first half of the files .*, 2 in the second: parallel text has as many"):
        read_table([tmp_path / name for name in lines], parallel=True)


def test_columns_are_found_by_their_usual_names_and_named_otherwise() -> None:
    table = Table("x.jsonl", [{"query": "who?", "passage": "the owl", "solution": "owl"}])
    found = find_columns(table, Answer.columns, {"answers": "solution"})
    assert found.rows == [{"question": "who?", "context": "the owl", "answers": "owl"}]
    assert found.notes[-1] == "columns question=query, context=passage, answers=solution"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "x.jsonl: no column 'answers' or 'answer'; found query, passage, solution, empty: name it with --columns answers=COLUMN"),
        ({"answers": "solutoin"}, "no column 'solutoin'; found query"),
        ({"answer": "solution"}, r"--columns answer=solution: this task has no such column \(did you mean 'answers'\?\)"),
        ({"answers": "empty"}, "example 1: its 'empty' is missing: fill it, or leave the example out"),
    ],
)
def test_missing_columns_are_named_with_what_is_there(named: dict[str, str], message: str) -> None:
    table = Table("x.jsonl", [{"query": "who?", "passage": "the owl", "solution": "owl", "empty": None}])
    with pytest.raises(UserError, match=message):
        find_columns(table, Answer.columns, named)


def test_absent_and_empty_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"train.jsonl: holds no example; give another file"):
        read_table([tmp_path / "train.jsonl"])
    with pytest.raises(UserError, match=r"trian.jsonl: no such file \(did you mean 'train.jsonl'\?\)"):
        read_table([tmp_path / "trian.jsonl"])
