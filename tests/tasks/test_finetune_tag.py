"""`teratron finetune tag`: every word is told once, wherever long sentences are cut, and what is no BIO is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuned import FILLER, NAMES, PLACES, Reader, decoder, encoder, finetune, reading, scores

from teratron.config import UserError
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.tag import Tag
from teratron.tasks.finetune.task import Options
from teratron.tasks.finetune.words import homes


def rows(count: int, seed: int) -> list[dict[str, list[str]]]:
    """Sentences of names, places of two words, and others."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for kind in draw.integers(0, 4, draw.integers(3, 7)):
            if kind == 0:
                words, tags = [*words, str(draw.choice(NAMES))], [*tags, "B-person"]
            elif kind == 1:
                words, tags = [*words, *str(draw.choice(PLACES)).split()], [*tags, "B-place", "I-place"]
            else:
                words, tags = [*words, str(draw.choice(FILLER))], [*tags, "O"]
        found.append({"words": words, "tags": tags})
    return found


def task_of(stride: int = 0, length: int = 24, **options: Any) -> Tag:
    task = Tag(Options(length, stride=stride, **options))
    task.learn([{"words": ["x", "y", "z"], "tags": ["B-person", "I-person", "B-place"]}])
    return task


@pytest.mark.parametrize("family", ["encoder", pytest.param("xlnet", marks=pytest.mark.slow)])
def test_it_learns(family: str, tmp_path: Path) -> None:
    assert finetune("tag", tmp_path, family, rows(150, 1), rows(40, 2), "--epochs", "4") == 0
    found = scores(tmp_path)
    assert found["metrics"]["f1"]["value"] > 0.95
    assert found["baseline"]["f1"] == 0
    assert any("new york (place)" in row["gold"] for row in found["predictions"])


def test_pieces_cover_every_word_and_tell_it_once() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 9, 40):
        words = decoder(40).words(["x" * int(n) for n in draw.integers(1, 8, count)])
        for room, stride in ((10, 1), (10, 5), (13, 3), (400, 100)):
            pieces = words.pieces(room, stride)
            assert set().union(*pieces) == set(range(count))
            assert all(0 < len(words.cut(piece)) <= room for piece in pieces)
            told = np.concatenate(homes(pieces))
            assert sorted(told) == list(range(count))
        first = words.pieces(10, 0)
        assert len(first) == 1
        assert first[0].start == 0


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("stride", [1, 4])
def test_every_word_is_learnt_once_where_it_can_be_told(make: Callable[[int], Coder], stride: int) -> None:
    """At its first token, of a decoder that sees nothing later at its last; what is predicted there comes back to the word."""
    coder, draw = make(12), np.random.default_rng(1)
    task = task_of(stride, 12)
    labels = task.facts["labels"]
    given = []
    for length in (1, 2, 7, 30):
        words = [str(word) for word in draw.choice([*FILLER, "dreadful", "splendidly", "ab-cd", "\u200b"], length)]
        given.append({"words": words, "tags": [str(tag) for tag in draw.choice(labels, length)]})
    examples = task.examples(given, coder)
    assert all(len(example["tokens"]) <= 12 for example in examples)
    told = [labels[number] for example in examples for number in example["targets"][example["weights"] > 0]]
    assert sorted(told) == sorted(tag for row in given for tag in row["tags"])
    assert task.notes() == []

    def tag_of(tokens: np.ndarray) -> str:
        return str(labels[tokens[-1 if coder.cls is None else 0] % len(labels)])

    reader = Reader(lambda state: state["tokens"] % len(labels), len(labels))
    predicted = task.predict(reader, reading("classes", len(labels)), given, coder)
    for row, tags in zip(given, predicted, strict=True):
        words = coder.words(row["words"])
        assert tags == [tag_of(words.cut(range(word, word + 1))) for word in range(len(words))]


def test_words_beyond_the_length_are_told_of_and_o() -> None:
    task, coder = task_of(0, 12), encoder(12)
    given = [{"words": ["the"] * 15, "tags": ["B-person"] * 15}, {"words": ["the"], "tags": ["O"]}]
    examples = task.examples(given, coder)
    assert [int((example["weights"] > 0).sum()) for example in examples] == [10, 1]
    assert task.notes() == ["5 words beyond 12 tokens were left out: --stride N cuts long sentences into pieces"]
    everything_a_person = Reader(lambda state: state["tokens"] * 0 + 1, len(task.facts["labels"]))
    assert task.predict(everything_a_person, reading("classes", 5), given, coder) == [["B-person"] * 10 + ["O"] * 5, ["B-person"]]


def test_rare_tags_may_weigh_as_much_as_others() -> None:
    task = Tag(Options(24, class_weights="balanced"))
    given = [{"words": ["a", "b", "c", "d"], "tags": ["O", "O", "B-x", "I-x"]}]
    task.learn(given)
    (example,) = task.examples(given, encoder())
    of = {
        label: example["weights"][(example["weights"] > 0) & (example["targets"] == n)].sum()
        for n, label in enumerate(task.facts["labels"])
    }
    assert of["O"] == pytest.approx(of["B-x"])
    assert of["O"] == pytest.approx(of["I-x"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "a b", "tags": ["O", "O"]}, r"example 1: its words are 'a b': expected a list of texts; .* --columns words=COLUMN"),
        ({"words": ["a"], "tags": [3]}, r"example 1: its tags are .*\[3\].*: expected a list of texts"),
        ({"words": ["a", "b"], "tags": ["O"]}, "example 1: 2 words and 1 tags: expected as many of each"),
        ({"words": [], "tags": []}, "0 words and 0 tags: expected as many of each, at least one"),
        ({"words": ["a"], "tags": ["S-loc"]}, "tag 'S-loc' is none of BIO: expected O, or B- or I-"),
        ({"words": ["a"], "tags": ["O"]}, "every tag is O: expected entities"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tag(Options(24)).learn([row])


def test_a_type_that_training_has_not_seen_is_named() -> None:
    task = task_of()
    task.check([{"words": ["a"], "tags": ["I-place"]}], "dev.conll")
    with pytest.raises(UserError, match=r"dev.conll, example 2: tag 'B-palce' is unseen in training \(did you mean 'B-place'\?\)"):
        task.check([{"words": ["a"], "tags": ["O"]}, {"words": ["a"], "tags": ["B-palce"]}], "dev.conll")
