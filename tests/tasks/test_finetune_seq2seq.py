"""`teratron finetune seq2seq`: what is learnt of a pair, what is written, and how it is scored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuned import ANIMALS, COLOURS, FILLER, decoder, finetune, pretrained, scores

from teratron.config import Config, UserError
from teratron.data.tokenizer import load_tokenizer
from teratron.models import build_model, initialise
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.seq2seq import Seq2Seq
from teratron.tasks.finetune.task import Options
from teratron.tasks.finetune.use import write

LONG = Options(24, target_length=8)


@functools.cache
def coder(family: str, length: int = 24) -> Coder:
    run = pretrained(family)
    return Coder(load_tokenizer(run / "tokenizer"), Config.load(run / "config.toml").model, length)


def read(*pairs: tuple[Any, Any]) -> list[Row]:
    return Seq2Seq.read(Table("pairs", [{"source": source, "target": target} for source, target in pairs])).rows


def test_a_decoder_learns_the_target_and_its_end_behind_the_source() -> None:
    of, (row,) = decoder(), read(("ab", "xyz"))
    (example,) = Seq2Seq(LONG).examples([row], of)
    assert example["tokens"].tolist() == [*b"ab", of.end, *b"xyz"]
    np.testing.assert_array_equal(example["tokens"][1:], example["targets"][:-1])
    assert example["targets"][example["weights"] > 0].tolist() == [*b"xyz", of.end]


def test_a_decoder_beside_an_encoder_learns_all_that_it_writes() -> None:
    of, (row,) = coder("encoder_decoder"), read(("red cat", "blue owl"))
    (example,) = Seq2Seq(LONG).examples([row], of)
    source, target = (ids.tolist() for ids in of.encode(["red cat", "blue owl"]))
    assert example["encoder_tokens"].tolist() == [*source, of.end]
    assert example["tokens"].tolist() == [of.start, *target]
    assert example["targets"].tolist() == [*target, of.end]
    assert example["weights"].all()


def test_of_a_target_that_is_cut_the_end_is_not_learned() -> None:
    of, rows, task = decoder(), read(("a" * 50, "b" * 50), ("a", "b")), Seq2Seq(LONG)
    long, short = task.examples(rows, of)
    assert long["targets"][long["weights"] > 0].tolist() == [*b"b" * 8]
    assert short["targets"][-1] == of.end
    assert task.notes() == ["2 sources or targets were cut"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt", "encoder_decoder"])
def test_what_is_written_about_a_row_does_not_depend_on_the_others(family: str, beams: int) -> None:
    config = Config.load(pretrained(family) / "config.toml")
    model = build_model(config.model, dtype=torch.float64)
    initialise(model, seed=3)
    rows = read(*((" ".join(FILLER[: 1 + number]), "x") for number in range(5)))
    task, of = Seq2Seq(Options(24, target_length=6, beams=beams)), coder(family)
    together = task.predict(model.eval(), config, rows, of)
    assert list(together) == [task.predict(model, config, [row], of)[0] for row in rows]
    assert len(set(together)) > 1


@pytest.mark.parametrize("family", ["gpt", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_it_learns_to_swap_two_words(tmp_path: Path, family: str) -> None:
    rows = [{"source": f"{colour} {animal}", "target": f"{animal} {colour}"} for colour in COLOURS for animal in ANIMALS]
    assert finetune("seq2seq", tmp_path, family, rows * 4, rows, "--epochs", "25", "--target-length", "4") == 0
    found = scores(tmp_path)
    assert found["metrics"]["exact_match"]["value"] > 0.8
    assert found["baseline"]["exact_match"] == 0
    predicted = {example["text"]: example["predicted"] for example in found["predictions"]}
    assert write(tmp_path / "run", ["red owl", "blue cat"]) == [predicted["red owl"], predicted["blue cat"]]


def test_several_targets_are_references_and_the_first_is_learned() -> None:
    (row,) = read((["One sentence.", "Another."], ["red cat", "blue owl"]))
    assert row == {"source": "One sentence. Another.", "lead": "One sentence.", "target": ["red cat", "blue owl"]}
    task, of = Seq2Seq(LONG), decoder()
    task.learn([row])
    (example,) = task.examples([row], of)
    assert bytes(example["targets"][example["weights"] > 0][:-1].tolist()) == b"red cat"
    metrics = {metric.name: metric.of(np.arange(1)) for metric in task.score([row], ["blue owl"]).metrics}
    assert metrics["exact_match"] == metrics["rougeL"] == 1


def test_the_number_behind_four_signs_is_compared_as_a_number() -> None:
    rows = read(("how many?", "2 + 2 = 4\n#### 4"), ("and now?", "#### 1,000"), ("then?", "#### 4"))
    task = Seq2Seq(LONG)
    task.learn(rows)
    written = ["four\n#### 4.0", "#### 1000", "5 #### 5"]
    scored = task.score(rows, written)
    assert {metric.name: metric.of(np.arange(3)) for metric in scored.metrics}["number_accuracy"] == pytest.approx(2 / 3)
    assert scored.good.tolist() == [1, 1, 0]
    assert all(text.endswith("#### 4") for text in task.baseline(rows))


def test_the_baseline_of_summaries_is_the_first_sentence() -> None:
    rows, task = read(("A first one. Then a long second one, and more.", "A short one")), Seq2Seq(LONG)
    task.learn(rows)
    assert task.baseline(rows) == ["A first one."]


def test_blank_pairs_are_left_out_and_told() -> None:
    table = Seq2Seq.read(Table("pairs", [{"source": "a", "target": "b"}, {"source": " ", "target": "b"}, {"source": "a", "target": ""}]))
    assert len(table.rows) == 1
    assert table.notes == ["2 without a source or a target left out"]


@pytest.mark.parametrize(("pair", "told"), [(({}, "x"), "example 1: column 'source': found '{}'"), (("", "x"), "no example has both")])
def test_rows_that_are_no_texts_are_refused(pair: tuple[Any, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read(pair)


def test_a_target_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(UserError, match="--target-length 23: leaves no room in the model's 24 positions"):
        Seq2Seq(Options(24, target_length=23)).examples(read(("a", "b")), coder("gpt"))


def test_an_option_of_another_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"source": "a", "target": "b"}] * 4
    assert finetune("seq2seq", tmp_path, "gpt", rows, rows, "--group", "4") != 0
    assert "--group 4 concerns embed, not seq2seq" in capsys.readouterr().err
