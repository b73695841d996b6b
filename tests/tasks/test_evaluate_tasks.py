"""What each task reads, and that its metrics are those of the likelihoods."""

from __future__ import annotations

import bz2
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored import log_probabilities, random_model

from teratron.checkpoint import LoadedModel
from teratron.config import UserError
from teratron.tasks.evaluate import TASKS, Mistake, Options, Report, evaluate
from teratron.tasks.evaluate.lambada import Lambada, Passage
from teratron.tasks.evaluate.likelihood import Likelihood, ModelScorer
from teratron.tasks.evaluate.questions import Question, read_questions
from teratron.tasks.evaluate.wikitext import join_words


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def result(loaded: LoadedModel, name: str, file: Path, batch: int = 3, **options: Any) -> Report:
    return evaluate(name, TASKS[name](Options(**options)), file, ModelScorer(loaded, batch))


def test_perplexity_of_a_short_text(tmp_path: Path) -> None:
    text = "a small text, 27 bytes long"
    (tmp_path / "t.txt").write_text(text)
    loaded = random_model()
    loss = -float(log_probabilities(loaded, [256, *text.encode()]).sum())
    found = {name: one.value for name, one in result(loaded, "perplexity", tmp_path / "t.txt").metrics.items()}
    wanted = {"token_perplexity": math.exp(loss / 27), "byte_perplexity": math.exp(loss / 27), "bits_per_byte": loss / 27 / math.log(2)}
    assert found == pytest.approx(wanted | {"word_perplexity": math.exp(loss / 6)})


@pytest.mark.parametrize(("stride", "batch"), [(1, 5), (12, 2), (32, 1)])
def test_perplexity_by_windows(tmp_path: Path, stride: int, batch: int) -> None:
    """Each token is seen behind the last ones of its window, counted here token by token."""
    text = "words of a text that is longer than thirty-two tokens, in which windows slide"
    loaded, ids = random_model(), [256, *text.encode()]
    loss, scored = 0.0, 0
    while scored < len(ids) - 1:
        end = min(scored + (stride if scored else 32), len(ids) - 1)
        window = ids[max(0, end - 32) : end + 1]
        loss -= float(log_probabilities(loaded, window)[-(end - scored) :].sum())
        scored = end
    (tmp_path / "t.txt").write_text(text)
    found = result(loaded, "perplexity", tmp_path / "t.txt", stride=stride, batch=batch)
    assert found.metrics["token_perplexity"].value == pytest.approx(math.exp(loss / (len(ids) - 1)))


def test_perplexity_of_several_documents(tmp_path: Path) -> None:
    """Each begins anew, and an empty one is none."""
    loaded, texts = random_model(), ["one text", "", "another one"]
    file = lines(tmp_path / "t.jsonl", *({"text": text} for text in texts))
    loss = -sum(float(log_probabilities(loaded, [256, *text.encode()]).sum()) for text in texts if text)
    found = result(loaded, "perplexity", file)
    assert found.metrics["token_perplexity"].value == pytest.approx(math.exp(loss / sum(map(len, texts))))
    assert found.count == 2


def test_detokenised_text_counts_the_words_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat 's @-@ mat , red")
    loaded = random_model()
    loss = -float(log_probabilities(loaded, [256, *b"the cat's-mat, red"]).sum())
    found = result(loaded, "perplexity", tmp_path / "t.txt", detokenise="wikitext").metrics
    assert found["word_perplexity"].value == pytest.approx(math.exp(loss / 7))
    assert found["token_perplexity"].value == pytest.approx(math.exp(loss / len("the cat's-mat, red")))


@pytest.mark.parametrize(
    ("cut", "joined"),
    [
        (" = = Early life = = \n He was", "== Early life ==\nHe was"),
        ("1 @,@ 000 @.@ 5 well @-@ known", "1,000.5 well-known"),
        ('in " Teddy \'s Story " ( 2004 ) of', 'in "Teddy\'s Story" (2004) of'),
        ("cats ' tails : red ; blue .", "cats' tails: red; blue ."),
    ],
)
def test_words_of_wikitext_are_joined(cut: str, joined: str) -> None:
    assert join_words(cut).strip() == joined


def test_words_of_wikitext_are_joined_as_lm_eval_does(shared: Path) -> None:
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-eval is not installed")
    text = (shared / "data" / "wikitext2" / "valid.txt").read_text("utf-8")[:200_000]
    assert join_words(text) == theirs.wikitext_detokenizer({"page": text})


def test_lambada_is_right_where_the_model_would_write_the_word(tmp_path: Path) -> None:
    loaded, texts = random_model(), ["the cat sat on the mat", "a dog in a", "b"[:0] + "cold old"]
    file = lines(tmp_path / "t.jsonl", *({"text": text} for text in texts))
    found, total = result(loaded, "lambada", file, batch=2), 0.0
    for text in texts:
        total += float(log_probabilities(loaded, list(text.encode()))[len(text.rpartition(" ")[0]) - 1 :].sum())
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(-total / 3))
    assert found.metrics["accuracy"].value == 0
    assert {mistake.expected for mistake in found.wrong} == {"mat", "a", "old"}


def test_lambada_counts_whole_words() -> None:
    task = Lambada(Options())
    task.guesses = [" mat", " mit"]
    answers = [Likelihood(-1.0, (1, 2), True), Likelihood(-3.0, (1, 3), False)]
    score = task.score([Passage("on the", " mat"), Passage("in the", " bag")], answers)
    assert [metric.of(np.array([0, 1])) for metric in score.metrics] == pytest.approx([0.5, math.exp(2)])
    assert list(score.wrong) == [Mistake("in the", "bag", "mit")]


CHOICES = [
    Question("the cat", (" sat", " sat down quietly", " ran"), 0),
    Question("a dog", (" is", " was here"), 0),
    Question("so", (" a", " b", " c", " d"), 0),
]


def test_choice_is_the_likeliest_and_the_likeliest_by_the_character(tmp_path: Path) -> None:
    loaded = random_model()
    best, best_by_size = [], []
    for question in CHOICES:
        ends = [choice.encode() for choice in question.choices]
        totals = [float(log_probabilities(loaded, [*question.context.encode(), *end])[-len(end) :].sum()) for end in ends]
        best.append(totals.index(max(totals)))
        by_size = [total / (len(end) - 1) for total, end in zip(totals, ends, strict=True)]
        best_by_size.append(by_size.index(max(by_size)))
    assert best != best_by_size
    for name, golds in (("accuracy", best), ("accuracy_norm", best_by_size)):
        rows = [
            {"query": q.context, "choices": [c.strip() for c in q.choices], "gold": gold} for q, gold in zip(CHOICES, golds, strict=True)
        ]
        found = result(loaded, "choice", lines(tmp_path / "q.jsonl", *rows), batch=2)
        assert found.metrics[name].value == 1
        assert found.facts["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
        assert found.wrong_count == (0 if name == "accuracy" else sum(a != b for a, b in zip(best, best_by_size, strict=True)))


HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A cook mixes.",
    "ctx_b": "the cook",
    "endings": ["rests [step] now", "eats"],
    "label": "1",
}
SHAPES: dict[str, tuple[dict[str, Any], list[Question]]] = {
    "plain": ({"query": "Who? ", "choices": ["me ", "you"], "gold": 1}, [Question("Who?", (" me", " you"), 1)]),
    "asked": ({"query": "Question: who?\n", "choices": ["a", "b"], "gold": 0}, [Question("Question: who?\nAnswer:", (" a", " b"), 0)]),
    "hellaswag": (HELLASWAG, [Question("Baking: A cook mixes. The cook", (" rests now", " eats"), 1)]),
    "arc": (
        {"question": {"stem": "Who?", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]}, "answerKey": "2"},
        [Question("Question: Who?\nAnswer:", (" x", " y"), 1)],
    ),
    "arc_columns": (
        {"question": "Who?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        [Question("Question: Who?\nAnswer:", (" x", " y"), 0)],
    ),
    "piqa": ({"goal": "To sit", "sol1": "x", "sol2": "y", "label": 1}, [Question("Question: To sit\nAnswer:", (" x", " y"), 1)]),
    "boolq": ({"passage": "P", "question": "is it", "answer": True}, [Question("P\nQuestion: is it?\nAnswer:", (" no", " yes"), 1)]),
    "race": (
        {"article": "A", "questions": ["q", "r"], "options": [["1", "2"], ["3", "4"]], "answers": ["B", "A"]},
        [Question("Article: A\n\nQuestion: q\nAnswer:", (" 1", " 2"), 1), Question("Article: A\n\nQuestion: r\nAnswer:", (" 3", " 4"), 0)],
    ),
    "race_flat": (
        {"article": "A", "question": "q", "options": ["1", "2"], "answer": "B"},
        [Question("Article: A\n\nQuestion: q\nAnswer:", (" 1", " 2"), 1)],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes(tmp_path: Path, shape: str) -> None:
    row, questions = SHAPES[shape]
    assert read_questions(lines(tmp_path / "q.jsonl", row)) == questions


def test_six_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "q.txt.bz2").write_bytes(bz2.compress(b"He sits\n2\ndown\nup\nstill\nagain\n" * 2))
    assert read_questions(tmp_path / "q.txt.bz2") == [Question("He sits", (" down", " up", " still", " again"), 2)] * 2


def test_real_sets_are_read(shared: Path) -> None:
    counts = {"arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838, "boolq": 3270, "openbook_qa": 500}
    assert {name: len(read_questions(shared / "data" / "mcq_llmfoundry" / f"{name}.jsonl")) for name in counts} == counts
    assert len(read_questions(shared / "data" / "hellaswag" / "hellaswag_val_full.txt.bz2")) == 10_042


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "choice",
            {"prompt": "x", "answer": "y"},
            "example 1: found the columns prompt, answer; expected one of these sets: choices, gold, query",
        ),
        ("choice", {"query": "x", "choices": ["a", "b"], "gold": 2}, "the right choice is number 2 of 2"),
        ("choice", {"query": "x", "choices": ["a", "b"], "gold": "B"}, "not as its columns let expect"),
        ("choice", {"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "C"}, "not as its columns let expect"),
        ("lambada", {"texts": "x"}, "example 1: found the columns texts, expected a text in a column 'text'"),
        ("lambada", {"text": "word"}, "'word' is a single word"),
        ("perplexity", {"text": 3}, "its 'text' is a int"),
        ("perplexity", {"text": " "}, "has no text to score"),
    ],
)
def test_wrong_data_is_named(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        result(random_model(), name, lines(tmp_path / "t.jsonl", row))


def test_a_cut_context_is_told(tmp_path: Path) -> None:
    rows = [{"query": "long " * 20, "choices": ["a", "b"], "gold": 0}, {"query": "short", "choices": ["a", "b"], "gold": 0}]
    assert result(random_model(), "choice", lines(tmp_path / "q.jsonl", *rows)).facts["texts cut on the left"] == 2


def test_an_encoder_decoder_has_no_perplexity_but_chooses(tmp_path: Path) -> None:
    loaded = random_model("span_corruption", family="encoder_decoder", position="relative")
    with pytest.raises(UserError, match="reads a text before it writes one"):
        result(loaded, "perplexity", lines(tmp_path / "t.jsonl", {"text": "a text"}))
    rows = [{"query": q.context, "choices": [c.strip() for c in q.choices], "gold": q.gold} for q in CHOICES]
    assert result(loaded, "choice", lines(tmp_path / "q.jsonl", *rows)).count == 3


@pytest.mark.parametrize(
    ("options", "message"), [({"stride": 33}, "--stride 33"), ({"stride": -1}, "--stride -1"), ({"detokenise": "x"}, "wikitext")]
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        result(random_model(), "perplexity", lines(tmp_path / "t.jsonl", {"text": "a text"}), **options)
