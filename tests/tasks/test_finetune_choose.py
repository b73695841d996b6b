"""`teratron finetune choose`: choices stand side by side without seeing each other, and what names no choice is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuned import BAD, FILLER, GOOD, decoder, encoder, finetune, reading, scores

from teratron.config import UserError
from teratron.data.examples import Examples
from teratron.data.special import SpecialTokens
from teratron.models import build_model, initialise
from teratron.objectives import build_objective
from teratron.objectives.compared import pointed
from teratron.tasks.finetune.choose import Choose
from teratron.tasks.finetune.rows import Table
from teratron.tasks.finetune.task import Options


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The right choice is the only good one."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        choices = int(draw.integers(2, 5))
        gold = int(draw.integers(choices))
        texts = [f"{draw.choice(FILLER)} {draw.choice(GOOD if number == gold else BAD)}" for number in range(choices)]
        found.append({"query": " ".join(draw.choice(FILLER, 6)), "choices": texts, "gold": gold})
    return found


def read(**row: Any) -> dict[str, Any]:
    return Choose.read(Table("quiz.jsonl", [{"question": "which?", "choices": ["x", "y"], "answer": 0} | row])).rows[0]


@pytest.mark.parametrize("family", ["encoder", "gpt"])
def test_it_learns_though_all_choices_are_longer_than_the_model(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("choose", tmp_path, family, rows(150, 1), rows(40, 2), "--epochs", "4") == 0
    assert "seq_length=24" not in capsys.readouterr().out, "the longest example has more tokens than the model has positions"
    found = scores(tmp_path)
    assert found["metrics"]["accuracy"]["value"] > 0.95 > 0.6 > found["baseline"]["accuracy"]


@pytest.mark.parametrize("make", [encoder, decoder])
def test_each_choice_stands_with_its_question_from_position_0(make: Any) -> None:
    coder = make(24)
    row = read(question="of the", choices=["red", "green owl", "a"], answer=1)
    (example,) = Choose(Options(24)).examples([row], coder)
    for number, choice in enumerate(row["choices"]):
        own = example["segments"] == number
        framed = coder.framed(*coder.encode(["of the", choice]))
        assert (example["tokens"][own] == framed.tokens).all()
        assert (example["positions"][own] == np.arange(own.sum())).all()
        assert np.flatnonzero(example["candidates"][own]).tolist() == [framed.mark]
        assert example["first_weights"][own].sum() == (number == 1)


def test_a_long_question_loses_its_beginning_and_no_choice_its_text() -> None:
    coder, task = encoder(16), Choose(Options(16))
    row = read(question="red " + "the " * 20 + "owl", choices=["green cat", "horse"], answer="B")
    (example,) = task.examples([row], coder)
    assert task.notes() == ["1 questions lost their beginning to fit into 16 tokens"]
    assert example["positions"].max() < 16
    for number, choice in enumerate(row["choices"]):
        own = example["tokens"][example["segments"] == number].tolist()
        red, owl = (coder.encode([word])[0].tolist() for word in ("red", "owl"))
        tail = [*owl, coder.end, *coder.encode([choice])[0].tolist(), coder.end]
        assert own[-len(tail) :] == tail
        assert not set(red) <= set(own)


@pytest.mark.parametrize("family", ["encoder", "gpt"])
def test_no_choice_sees_another(family: str) -> None:
    """Scores go with their choices into any order, and into a batch with others."""
    config = reading("pointing", 1).override(
        {"model.family": family, "model.layers": 2, "model.hidden": 16, "model.heads": 2, "model.seq_length": 64, "model.vocab_size": 280}
    )
    config = config.override({"model.init_std": 0.3})
    coder = decoder(24)
    model = build_model(config.model, dtype=torch.float64)
    initialise(model, 1)
    choices = ["red", "a long one", "owl"]

    def scored(*orders: list[int]) -> list[list[float]]:
        examples = Choose(Options(24)).examples([read(choices=[choices[n] for n in order]) for order in orders], coder)
        objective = build_objective(config)
        batch = objective.prepare(Examples.of(examples), np.arange(len(orders)), SpecialTokens(0))
        found = pointed(model, model(objective.inputs(batch)), batch["candidates"])[..., 0]
        return [row[there.bool()].tolist() for row, there in zip(found, batch["candidates"], strict=True)]

    (whole,) = scored([0, 1, 2])
    assert len({round(score, 9) for score in whole}) == 3
    for order, found in zip([[2, 0, 1], [1, 0]], scored([2, 0, 1], [1, 0]), strict=True):
        assert found == pytest.approx([whole[number] for number in order], rel=1e-9)


@pytest.mark.parametrize(
    ("choices", "answer", "number"),
    [
        (["x", "y"], 1, 1),
        (["x", "y"], "1", 1),
        (["x", "y"], "B", 1),
        (["x", "y"], "y", 1),
        (["1", "0"], "0", 1),
        (["B", "A"], "A", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "1", 0),
    ],
)
def test_an_answer_is_a_text_a_name_or_a_number(choices: Any, answer: Any, number: int) -> None:
    assert read(choices=choices, answer=answer)["answer"] == number


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 2}, "quiz.jsonl, example 1: its answer 2 is none of 2 choices: expected a number from 0 to 1, a letter from A to B"),
        ({"answer": -1}, "its answer -1 is none of 2 choices"),
        ({"answer": "C"}, "its answer 'C' is none of 2 choices"),
        ({"choices": ["x"]}, "expected a list of two texts at least; name it with --columns choices=COLUMN"),
        ({"choices": "x, y"}, "its choices are 'x, y': expected a list"),
        ({"question": None}, "has a NoneType in column 'question', expected text"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read(**row)
    assert message in str(error.value)
