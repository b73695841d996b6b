"""`teratron finetune answer`: spans come back to the exact text, pieces leave nothing out, and answers that are not there are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from tuned import ANIMALS, COLOURS, FILLER, Reader, decoder, encoder, finetune, reading, scores

from teratron.config import UserError
from teratron.models import State
from teratron.tasks.finetune.answer import LONGEST, Answer, _span, best_span, word_spans
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.rows import Table
from teratron.tasks.finetune.task import Options


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The question decides which of two words is the answer; a fifth have none."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        words = {"colour": str(draw.choice(COLOURS)), "animal": str(draw.choice(ANIMALS))}
        asked, lacks = str(draw.choice(list(words))), draw.integers(5) == 0
        there = [word for kind, word in words.items() if kind != asked or not lacks]
        context = " ".join(draw.permutation([*map(str, draw.choice(FILLER, 3)), *there])) + "."
        found.append({"question": f"which {asked}?", "context": context, "answers": [] if lacks else [words[asked]]})
    return found


def read(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return Answer.read(Table("squad.json", list(rows))).rows


@pytest.mark.parametrize("family", ["encoder", "gpt"])
def test_it_learns_what_was_asked_and_that_there_is_none(tmp_path: Path, family: str) -> None:
    assert finetune("answer", tmp_path, family, rows(300, 1), rows(50, 2), "--epochs", "8") == 0
    found = scores(tmp_path)
    assert found["metrics"]["exact_match"]["value"] > 0.9 > 0.5 > found["baseline"]["exact_match"]
    assert any(row["predicted"] == row["gold"] == "(no answer)" for row in found["predictions"])


@given(st.text(max_size=60))
def test_words_are_all_that_is_no_space(text: str) -> None:
    spans = word_spans(text)
    covered = {place for start, stop in spans for place in range(start, stop)}
    dark = {place for place, character in enumerate(text) if not character.isspace()}
    assert dark <= covered
    assert not dark or covered == dark
    assert spans == sorted(spans)


@given(st.text("aé東 .,-'", min_size=1, max_size=40), st.data())
def test_an_answer_of_whole_words_comes_back_as_it_is(text: str, data: st.DataObject) -> None:
    spans = word_spans(text)
    first = data.draw(st.integers(0, len(spans) - 1))
    last = data.draw(st.integers(first, len(spans) - 1))
    answer = text[spans[first][0] : spans[last][1]]
    if answer.strip():
        assert _span({"context": text, "answers": [(answer, spans[first][0])]}) == (first, last)


def test_part_of_a_word_is_answered_with_the_word() -> None:
    (row,) = read({"question": "when?", "context": "In the 1960s (late)", "answers": "1960"})
    assert _span(row) == (2, 2)
    assert word_spans(row["context"])[2] == (7, 12)


def marked(coder: Coder) -> Reader:
    """Says that an answer begins at `red` and ends at `owl`, or is at the mark."""
    begin, end = (int(coder.words(["x", word]).tokens[-1]) for word in ("red", "owl"))
    mark = coder.end if coder.cls is None else coder.cls

    def says(state: State) -> Tensor:
        tokens = state["tokens"]
        return torch.stack([10.0 * (tokens == begin) + 5.0 * (tokens == mark), 10.0 * (tokens == end) + 5.0 * (tokens == mark)], -1)

    return Reader(says, 2)


@pytest.mark.parametrize("stride", [0, 3, 6])
def test_a_span_is_found_in_any_piece_and_cut_from_the_text(stride: int) -> None:
    coder, draw = encoder(20), np.random.default_rng(stride)
    given = []
    for length in (0, 4, 25):
        filler = [" ".join(draw.choice(FILLER, length)) for _ in range(2)]
        given.append({"question": "which ?", "context": f"{filler[0]}  red ,the  owl. {filler[1]}", "answers": "red ,the  owl"})
    given.append({"question": "which ?", "context": " ".join(draw.choice(FILLER, 30)), "answers": []})
    task, table = Answer(Options(20, stride=stride)), read(*given)
    task.learn(table)
    found = task.predict(marked(coder), reading("pointing", 2), table, coder)
    assert found == ["red ,the  owl"] * (3 if stride else 2) + [""] * (1 if stride else 2), "shared tokens are enough for the span"


@pytest.mark.parametrize("make", [encoder, decoder])
def test_a_piece_points_at_its_answer_or_at_its_mark(make: Any) -> None:
    """The question stands before the context; every place of an answer is a candidate, and so is the mark."""
    coder = make(40)
    (row,) = read({"question": "who?", "context": " ".join(["the"] * 20 + ["red", "owl"] + ["a"] * 20), "answers": "red owl"})
    task = Answer(Options(40, stride=12))
    examples = task.examples([row], coder)
    assert len(examples) > 1
    assert task.notes() == []
    question = coder.encode(["who?"])[0]
    first = int(coder.cls is not None)
    mark = [0 if coder.cls is not None else len(example["tokens"]) - 1 for example in examples]
    right = [tuple(int(example[f"{place}_weights"].argmax()) for place in ("first", "second")) for example in examples]
    for example, at, (begin, end) in zip(examples, mark, right, strict=True):
        assert len(example["tokens"]) <= 40
        assert (example["tokens"][first : first + len(question)] == question).all()
        assert example["candidates"][[at, begin, end]].all()
        assert not example["candidates"][first : first + len(question) + 1].any() or coder.cls is None
        assert example["first_weights"].sum() == example["second_weights"].sum() == 1
        assert (begin == at) == (end == at)
    assert any(begin != at for at, (begin, _) in zip(mark, right, strict=True))
    assert any(begin == at for at, (begin, _) in zip(mark, right, strict=True))


def test_an_answer_beyond_the_length_is_told_of() -> None:
    task = Answer(Options(20))
    examples = task.examples(read({"question": "who?", "context": "the " * 40 + "owl", "answers": "owl"}), encoder(20))
    assert [int(example["first_weights"].argmax()) for example in examples] == [0]
    assert task.notes() == ["1 answers are in no piece of 20 tokens: --stride N cuts long texts into pieces"]


def test_the_best_span_is_the_best_of_all_that_are_short_enough() -> None:
    draw = np.random.default_rng(3)
    for count in (1, 2, LONGEST + 20):
        begins, ends = draw.standard_normal((2, count))
        every = [(begins[a] + ends[b], a, b) for a in range(count) for b in range(a, min(a + LONGEST, count))]
        assert best_span(begins, ends) == max(every)


@pytest.mark.parametrize(
    "answers",
    [
        "the owl",
        ["the owl"],
        [("the owl", 9)],
        {"text": ["the owl"], "answer_start": [9]},
        {"text": "the owl", "answer_start": 9},
        [{"text": "the owl", "answer_start": 9}],
    ],
)
def test_answers_are_read_as_they_usually_stand(answers: Any) -> None:
    start = 0 if answers in ("the owl", ["the owl"]) else 9
    assert read({"question": "who?", "context": "the owl, the owl", "answers": answers})[0]["answers"] == [("the owl", start)]


@pytest.mark.parametrize("answers", ["", [], {"text": [], "answer_start": []}, [{"text": "", "answer_start": 0}]])
def test_no_answer_is_read_as_it_usually_stands(answers: Any) -> None:
    assert read({"question": "who?", "context": "the owl", "answers": answers})[0]["answers"] == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": "cat"}, "squad.json, example 2: the answer 'cat' is not in its context, word for word: correct it"),
        ({"answers": [("owl", 3)]}, "the answer 'owl' does not begin at character 3 of its context: expected 4; correct it"),
        ({"answers": [7]}, "an answer is 7 at None: expected a text"),
        ({"answers": {"text": ["owl"], "answer_start": ["4"]}}, "an answer is 'owl' at '4': expected a text"),
        ({"context": ["the", "owl"]}, "has a list in column 'context', expected text"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(row: dict[str, Any], message: str) -> None:
    good = {"question": "who?", "context": "the owl", "answers": ["owl"]}
    with pytest.raises(UserError) as error:
        read(good, good | row)
    assert message in str(error.value)


def test_questions_without_any_answer_are_refused() -> None:
    with pytest.raises(UserError, match="no question has an answer"):
        Answer(Options(20)).learn(read({"question": "who?", "context": "the owl", "answers": []}))
