"""`teratron finetune embed`: a text's vector is its own, pairs find each other, and what is no pair is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuned import ANIMALS, COLOURS, FILLER, NAMES, encoder, finetune, scores

from teratron.config import Config, UserError
from teratron.config.sections import ObjectiveConfig
from teratron.data.examples import Examples
from teratron.data.special import SpecialTokens
from teratron.models import Model, build_model, initialise
from teratron.models.units import with_dropout
from teratron.objectives import build_objective
from teratron.objectives.compared import vectors_of
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.embed import Embed, vectors
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import Options
from teratron.tasks.finetune.use import embed, reply

PAIRS = [(f"{colour} {animal}", f"{name} {word} the") for colour, animal, name, word in zip(COLOURS, ANIMALS, NAMES, FILLER, strict=False)]


def read(*rows: Mapping[str, Any]) -> list[Row]:
    return Embed.read(Table("pairs", [dict(row) for row in rows])).rows


def pairs(count: int = 4) -> list[Row]:
    return read(*({"text": text, "positive": positive} for text, positive in PAIRS[:count]))


def learnt(rows: list[Row], **options: Any) -> Embed:
    task = Embed(Options(24, **options))
    task.learn(rows)
    return task


def model_of(of: Coder, dropout: float = 0.0) -> tuple[Model, Config]:
    keys = {"model.head": "none", "objective.name": "similar", "data.examples": "there", "model.dropout": dropout, "model.seq_length": 200}
    config = Config(model=of.config, objective=ObjectiveConfig(name="masked")).override(keys | {"model.max_positions": 24})
    model = build_model(config.model, dtype=torch.float64)
    initialise(model, seed=1)
    return model, config


def test_a_vector_does_not_depend_on_the_texts_beside_it() -> None:
    of, rows = encoder(), pairs()
    (example,) = learnt(rows).examples(rows, of)
    model, config = model_of(of)
    objective = build_objective(config)
    batch = objective.prepare(Examples.of([example]), np.arange(1), SpecialTokens(0))
    found = vectors_of(model, model(objective.inputs(batch)), batch)[0].detach().numpy()
    texts = [text for pair in PAIRS for text in pair]
    alone = np.concatenate([vectors(model, config, [text], of) for text in texts])
    nearest = (alone @ found.T).argmax(1)
    assert sorted(nearest) == list(range(8))
    np.testing.assert_allclose(alone, found[nearest], atol=1e-6)  # vectors are given out in float32
    np.testing.assert_allclose(alone, vectors(model, config, texts, of), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, rtol=1e-6)


def test_pairs_are_neighbours_and_every_one_is_in_one_group() -> None:
    of, rows = encoder(), pairs()
    examples = learnt(rows, group=3).examples(rows, of)
    assert len(examples) == 2
    found = set()
    for example in examples:
        sides = [example["tokens"][example["segments"] == number].tolist() for number in range(example["segments"].max() + 1)]
        found |= {tuple(of.tokenizer.decode(side[1:-1]) for side in pair) for pair in zip(sides[::2], sides[1::2], strict=True)}
        assert sum(example["vector_weights"]) == pytest.approx(len(sides))
    assert found == set(PAIRS)


def test_without_pairs_two_readings_of_a_text_differ_by_dropout() -> None:
    of = encoder()
    rows = read(*({"text": text} for text, _ in PAIRS))
    (example,) = learnt(rows).examples(rows, of)
    model, config = model_of(of, dropout=0.1)
    objective = build_objective(config)
    batch = objective.prepare(Examples.of([example]), np.arange(1), SpecialTokens(0))
    state = with_dropout(objective.inputs(batch), model.streams, 1, 1, batch["sample"])
    found = vectors_of(model.train(), model(state), batch)[0]
    cosines = (found[::2] * found[1::2]).sum(-1)
    assert (cosines < 0.9999).all()
    quiet = vectors_of(model, model(objective.inputs(batch)), batch)[0]
    torch.testing.assert_close(quiet[::2], quiet[1::2])


def test_without_pairs_dropout_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": text} for text, _ in PAIRS]
    assert finetune("embed", tmp_path, "encoder", rows, rows) != 0
    assert "model.dropout = 0.0: without a column of positives only dropout" in capsys.readouterr().err


def test_it_learns_pairs_without_a_word_in_common(tmp_path: Path) -> None:
    rows = [{"text": text, "positive": positive} for text, positive in PAIRS] * 8
    assert finetune("embed", tmp_path, "encoder", rows, rows[:4], "--group", "4", "--epochs", "40") == 0
    found = scores(tmp_path)
    assert found["metrics"]["recall@1"]["value"] == 1 > found["baseline"]["recall@1"]
    one, other = embed(tmp_path / "run", [PAIRS[0][0], PAIRS[0][1]])
    assert one @ other > max(one @ vector for vector in embed(tmp_path / "run", [positive for _, positive in PAIRS[1:]]))
    np.testing.assert_allclose(np.linalg.norm(one), 1, rtol=1e-6)
    with pytest.raises(UserError, match="a run of the task embed, expected one of chat"):
        reply(tmp_path / "run", [{"role": "user", "content": "hello"}])


def test_words_in_common_are_the_baseline() -> None:
    rows = read(*({"text": f"a {word} thing", "positive": f"the {word}"} for word in COLOURS))
    task = learnt(rows)
    metrics = {metric.name: metric.of(np.arange(4)) for metric in task.score(rows, task.baseline(rows)).metrics}
    assert metrics == {"mrr": 1, "ndcg@10": 1, "recall@1": 1, "recall@10": 1}


def test_scores_are_compared_by_rank_and_only_good_pairs_learned_from() -> None:
    rows = read(*({"sentence": "x", "text": f"t{n}", "positive": f"p{n}", "score": str(n)} for n in range(6)))
    task = learnt(rows)
    assert len(task._pairs(rows)) == 2  # of 4 and 5
    angles = np.linspace(1.5, 0.1, 6)
    found = [np.array([[1, 0], [np.cos(angle), np.sin(angle)]]) for angle in angles]
    metrics = {metric.name: metric.of(np.arange(6)) for metric in task.score(rows, found).metrics}
    assert metrics["spearman"] == pytest.approx(1)


def test_labels_choose_the_pairs() -> None:
    labels = ("entailment", "neutral", "Entailment", "contradiction")
    table = Table("pairs", [{"text": f"t{n}", "positive": f"p{n}", "label": label} for n, label in enumerate(labels)])
    found = Embed.read(table)
    assert [row["text"] for row in found.rows] == ["t0", "t2"]
    assert found.notes == ["2 of 4 rows belong together by their label"]
    with pytest.raises(UserError, match="its labels are neutral: expected entailment"):
        Embed.read(Table("pairs", table.rows[1:2]))


def test_what_is_no_score_and_a_single_pair_are_refused() -> None:
    with pytest.raises(UserError, match="example 1: its score is 'high', expected a number"):
        read({"text": "a", "positive": "b", "score": "high"})
    with pytest.raises(UserError, match="1 pairs belong together, expected two at least"):
        learnt(pairs(1))
