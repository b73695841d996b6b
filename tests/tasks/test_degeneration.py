"""Measures of degenerate text against their definitions, and against texts of which the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from teratron.config import ModelConfig
from teratron.models import Model, build_model, initialise
from teratron.tasks.degeneration import diversity, judge, log_likelihoods, repetition


@pytest.fixture(scope="module")
def model() -> Model:
    config = ModelConfig(layers=1, hidden=16, heads=2, seq_length=16, vocab_size=20, init_std=0.4, position="rope")
    built = build_model(config, dtype=torch.float64)
    initialise(built, 1)
    return built.eval()


def test_repetition_counts_what_a_text_has_had_before() -> None:
    text = list("abababc")  # pairs: ab ba ab ba ab bc
    assert repetition([text], 2) == pytest.approx(100 * (1 - 3 / 6))
    assert repetition([text], 4) == pytest.approx(100 * (1 - 3 / 4))  # abab baba abab babc
    assert repetition([text], 8) == 0


def test_texts_do_not_repeat_each_other_and_longer_ones_count_more() -> None:
    assert repetition([[1, 2, 3], [1, 2, 3]], 2) == 0
    assert repetition([[1, 1, 1, 1, 1], [2, 3]], 2) == pytest.approx(100 * (1 - 2 / 5))


def test_diversity_is_one_without_repetition_and_falls_to_nothing() -> None:
    assert diversity([list(range(100))]) == 1
    assert diversity([[5] * 100]) == pytest.approx(1 / 99 / 98 / 97)


def test_likelihoods_are_the_models_own(model: Model) -> None:
    tokens = [3, 1, 4, 1, 5, 9]
    found = log_likelihoods(model, tokens)
    for place in range(1, len(tokens)):
        state = {"tokens": torch.tensor([tokens[:place]]), "positions": torch.arange(place)[None]}
        with torch.no_grad():
            logits = model.head.output(model(state)["hidden"])[0, -1]
        assert found[place - 1].item() == pytest.approx(logits.softmax(-1)[tokens[place]].log().item(), rel=1e-12)


def test_the_judgement_is_of_continuations_only(model: Model) -> None:
    prefixes, texts = [[1, 2, 3], [4]], [[7, 8, 9], [7, 5]]
    behind = [log_likelihoods(model, [1, 2, 3, 7, 8, 9])[2:], log_likelihoods(model, [4, 7, 5])]
    alone = [log_likelihoods(model, text) for text in texts]
    found = judge(model, prefixes, texts)
    assert found.perplexity == pytest.approx(math.exp(-float(sum(x.sum() for x in behind)) / 5), rel=1e-12)
    told = sum(float((x[1:] - y).sum()) for x, y in zip(behind, alone, strict=True)) / 3
    assert found.coherence == pytest.approx(told, rel=1e-12)
    assert abs(told) > 1e-3
