"""Every metric equals its reference package, on random inputs and at the edges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import seqeval.metrics
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as sk

from teratron.tasks.metrics import (
    Metric,
    Text,
    accuracy,
    bleu,
    brier,
    calibration_error,
    chrf,
    entity_counts,
    entity_f1,
    estimate,
    exact_match,
    f1,
    f1_of,
    matthews,
    ndcg,
    pearson,
    perplexities,
    recall_at,
    reciprocal_rank,
    rouge,
    span_f1,
    spearman,
)

DRAW = np.random.default_rng(0)
LABELS = [
    (DRAW.integers(4, size=50), DRAW.integers(4, size=50)),
    (DRAW.integers(2, size=9), DRAW.integers(2, size=9)),
    (np.array([1, 1, 1]), np.array([1, 1, 1])),
    (np.array([0, 0]), np.array([1, 1])),
    (np.array([2]), np.array([0])),
    (np.array([0, 1, 2]), np.array([1, 1, 1])),
]


@pytest.mark.parametrize(("guess", "right"), LABELS)
def test_classes_equal_scikit_learn(guess: np.ndarray, right: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert accuracy(guess, right) == pytest.approx(sk.accuracy_score(right, guess))
        assert matthews(guess, right) == pytest.approx(sk.matthews_corrcoef(right, guess))
        for average in ("macro", "micro", "weighted"):
            assert f1(guess, right, average) == pytest.approx(sk.f1_score(right, guess, average=average, zero_division=0)), average
        wanted = sk.f1_score(right == 1, guess == 1, zero_division=0)
        assert f1(guess, right, "binary") == pytest.approx(wanted)


def test_labels_may_be_words() -> None:
    assert f1(["yes", "no", "no"], ["yes", "yes", "no"], "binary", positive="yes") == pytest.approx(2 / 3)


def test_uneven_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="3 predictions for 2 labels"):
        accuracy([1, 2, 3], [1, 2])


def random_tags(sentences: int) -> list[list[str]]:
    """Tags that follow no grammar: I- behind O and behind another type, too."""
    tags = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-a-b", "B-a-b"]
    return [[tags[number] for number in DRAW.integers(len(tags), size=length)] for length in DRAW.integers(1, 12, size=sentences)]


def test_entities_equal_seqeval() -> None:
    gold = random_tags(60)
    guess = [[tag if DRAW.random() < 0.7 else other for tag, other in zip(row, [*row[1:], "O"], strict=True)] for row in gold]
    assert 0.2 < entity_f1(guess, gold) < 1
    assert entity_f1(guess, gold) == pytest.approx(seqeval.metrics.f1_score(gold, guess))
    for chosen in ([3], [4, 4, 8], [0, 1, 2]):
        picked = [[rows[number] for number in chosen] for rows in (gold, guess)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert f1_of(entity_counts(guess, gold)[chosen]) == pytest.approx(seqeval.metrics.f1_score(*picked))


@pytest.mark.parametrize(
    ("guess", "gold", "wanted"),
    [
        ([["O", "O"]], [["O", "O"]], 0.0),
        ([["O", "O"]], [["B-X", "O"]], 0.0),
        ([["I-X", "I-X"]], [["B-X", "I-X"]], 1.0),
        ([["B-X", "B-X"]], [["B-X", "I-X"]], 0.0),
        ([["B-X", "I-Y"]], [["B-X", "O"]], 2 / 3),
    ],
)
def test_entities_at_the_edges(guess: list[list[str]], gold: list[list[str]], wanted: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert seqeval.metrics.f1_score(gold, guess) == pytest.approx(wanted)
    assert entity_f1(guess, gold) == pytest.approx(wanted)


def test_unknown_tag_is_named() -> None:
    with pytest.raises(ValueError, match="tag 'S-X' of word 2"):
        entity_f1([["O", "S-X"]], [["O", "O"]])


@pytest.mark.parametrize(
    ("guess", "gold", "exact", "shared"),
    [
        ("eiffel tower!", ["The Eiffel Tower"], 1, 1),
        ("in 1889", ["1889"], 0, 2 / 3),
        ("a tower in Paris", ["Paris", "the tower of Paris"], 0, 2 / 3),
        ("paris paris", ["Paris"], 0, 2 / 3),
        ("Paris-the", ["paristhe"], 1, 1),
        ("a  new\nanswer", ["New Answer"], 1, 1),
        ("the", [""], 1, 1),
        ("x", ["the", "y"], 0, 0),
        ("", ["x"], 0, 0),
    ],
)
def test_spans_by_the_rules_of_squad(guess: str, gold: list[str], exact: float, shared: float) -> None:
    """Case, punctuation, English articles and white space do not count; words do as often as they occur in both."""
    assert (exact_match(guess, gold), span_f1(guess, gold)) == (exact, pytest.approx(shared))


def test_no_answer_is_an_answer() -> None:
    assert (exact_match("", []), span_f1("", []), exact_match("x", []), span_f1("x", [])) == (1, 1, 0, 0)


TEXTS = ["the cat sat on the mat", "", "a dog barked loudly at night .", "cats running", "猫が座った", "the the the"]
REFERENCES: list[list[str]] = [
    ["the cat sat on a mat", "a cat was on the mat"],
    ["nothing"],
    ["a dog barks at night."],
    [""],
    ["猫が座る"],
    ["the"],
]


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [0], [1], [2, 2, 5], [4, 3]])
def test_texts_equal_sacrebleu_and_rouge_score(chosen: list[int]) -> None:
    texts, rights = [TEXTS[n] for n in chosen], [REFERENCES[n] for n in chosen]
    columns = [[right[column] if column < len(right) else None for right in rights] for column in range(2)]
    assert bleu(TEXTS, REFERENCES).of(np.array(chosen)) == pytest.approx(sacrebleu.corpus_bleu(texts, columns).score)
    assert chrf(TEXTS, REFERENCES).of(np.array(chosen)) == pytest.approx(sacrebleu.corpus_chrf(texts, columns).score)
    for metric in rouge(TEXTS, REFERENCES):
        scorer = RougeScorer([metric.name], use_stemmer=True)
        best = [max(scorer.score(right, text)[metric.name].fmeasure for right in ones) for text, ones in zip(texts, rights, strict=True)]
        assert metric.of(np.array(chosen)) == pytest.approx(np.mean(best))


def test_ranking_equals_scikit_learn() -> None:
    scores = DRAW.integers(6, size=(40, 12)).astype(float)  # with many ties
    relevance = DRAW.integers(3, size=(40, 12)) * (DRAW.random((40, 12)) < 0.4)
    for k in (1, 5, 10, 100):
        assert ndcg(scores, relevance, k).mean() == pytest.approx(sk.ndcg_score(relevance, scores, k=k)), k
    single = np.eye(12)[DRAW.integers(12, size=40)]
    assert reciprocal_rank(scores, single).mean() == pytest.approx(sk.label_ranking_average_precision_score(single, scores))
    distinct = DRAW.permuted(np.tile(np.arange(12.0), (40, 1)), axis=1)
    for k in (1, 3, 12):
        assert recall_at(distinct, single, k).mean() == pytest.approx(sk.top_k_accuracy_score(single.argmax(1), distinct, k=k))


def test_ranking_without_a_relevant_document() -> None:
    scores, nothing = np.array([[0.3, 0.1]]), np.zeros((1, 2))
    assert [float(of[0]) for of in (ndcg(scores, nothing), reciprocal_rank(scores, nothing), recall_at(scores, nothing, 1))] == [0, 0, 0]


@pytest.mark.parametrize("size", [2, 3, 30])
def test_similarity_equals_scipy(size: int) -> None:
    x, y = DRAW.normal(size=size), DRAW.integers(4, size=size) + np.arange(size) % 2
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0], nan_ok=True)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0], nan_ok=True)
    assert math.isnan(pearson(x, np.ones(size)))
    assert math.isnan(spearman(np.ones(1), np.ones(1)))


def test_brier_equals_scikit_learn() -> None:
    probabilities, gold = DRAW.dirichlet(np.ones(3), size=20), DRAW.integers(3, size=20)
    wanted = sk.brier_score_loss(gold, probabilities, labels=[0, 1, 2], scale_by_half=False)
    assert brier(probabilities, gold).mean() == pytest.approx(wanted)


def test_calibration_by_hand() -> None:
    """Bins (0, 0.5] and (0.5, 1]: gaps |0.3 - 1| * 1 and |(0.6 + 1.0) - 1| of 3 examples."""
    assert calibration_error(np.array([0.3, 0.6, 1.0]), np.array([1, 0, 1]), bins=2) == pytest.approx((0.7 + 0.6) / 3)
    assert calibration_error(np.array([0.5, 0.5, 0.0, 1.0]), np.array([1, 0, 0, 1])) == pytest.approx(0)


def test_perplexities_of_even_odds() -> None:
    found = perplexities(10 * math.log(2), Text(tokens=10, words=5, bytes=20))
    wanted = {"token_perplexity": 2.0, "word_perplexity": 4.0, "byte_perplexity": math.sqrt(2), "bits_per_byte": 0.5}
    assert found == pytest.approx(wanted)


def test_interval_is_that_of_the_normal_approximation() -> None:
    values = DRAW.random(400) < 0.3
    found = estimate(Metric.mean("accuracy", values), 400)
    margin = 1.96 * math.sqrt(found.value * (1 - found.value) / 400)
    assert found.value == values.mean()
    assert (found.value - found.low, found.high - found.value) == pytest.approx((margin, margin), rel=0.2)


def test_interval_is_a_function_of_the_seed() -> None:
    metric = Metric.mean("x", DRAW.random(30))
    assert estimate(metric, 30, seed=1) == estimate(metric, 30, seed=1)
    assert estimate(metric, 30, seed=1) != estimate(metric, 30, seed=2)


@pytest.mark.parametrize("values", [[0.25], [0.25] * 9])
def test_interval_of_examples_that_are_alike(values: Sequence[float]) -> None:
    found = estimate(Metric.mean("x", values), len(values))
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)


def test_interval_passes_over_draws_without_a_value() -> None:
    """A draw of one example alone has no correlation."""
    x = np.array([0.0, 1.0, 3.0])
    found = estimate(Metric("r", lambda chosen: pearson(x[chosen], -x[chosen])), 3)
    assert (found.low, found.value, found.high) == pytest.approx((-1, -1, -1))
