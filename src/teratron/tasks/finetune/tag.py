"""`tag`: the entities in sentences whose words have BIO tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from teratron.config import Config, UserError, nearest
from teratron.data.examples import Example
from teratron.models import Model
from teratron.tasks.finetune.coder import Coder, Framed
from teratron.tasks.finetune.rows import Row
from teratron.tasks.finetune.task import Scored, Task, forward, weights_of
from teratron.tasks.finetune.words import homes
from teratron.tasks.metrics import Metric, entities, entity_counts, f1_of


@dataclass(frozen=True)
class Piece:
    """A stretch of a sentence in a frame."""

    row: int
    words: np.ndarray
    """Numbers of the words whose tags are told here."""
    framed: Framed
    places: np.ndarray
    """Where the token is that stands for each of them."""


class Tag(Task):
    """Every word has the tag of the one of its tokens that stands for it; a word that is in several pieces is told in one."""

    name = "tag"
    summary = "entities: a BIO tag for each word; long sentences by pieces with --stride"
    families = ("encoder", "gpt", "xlnet")
    takes = ("stride", "class_weights")
    objective = "classes"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {"words": ("words", "tokens"), "tags": ("tags", "ner_tags", "labels")}

    def learn(self, rows: Sequence[Row]) -> None:
        check_lists(rows, "--data")
        counts = Counter(tag for row in rows for tag in row["tags"])
        kinds = sorted({tag[2:] for tag in counts if tag != "O"})
        if not kinds:
            raise UserError("--data: every tag is O: expected entities, with tags such as B-person and I-person; is it the column of tags?")
        labels = ["O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]
        self.facts = {"labels": labels, "counts": [counts[label] for label in labels]}

    def check(self, rows: Sequence[Row], name: str) -> None:
        check_lists(rows, name)
        for number, row in enumerate(rows, 1):
            for tag in row["tags"]:
                if tag not in self.facts["labels"]:
                    raise UserError(
                        f"{name}, example {number}: tag {tag!r} is unseen in training{nearest(tag, self.facts['labels'])}: add "
                        "examples of it to --data, or make it O"
                    )

    def keys(self) -> dict[str, object]:
        return {"model.head": "classes", "model.classes": len(self.facts["labels"])}

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        numbers = {label: number for number, label in enumerate(self.facts["labels"])}
        weights = weights_of(self.facts["counts"], self.options.class_weights)
        tags = [np.array([numbers[tag] for tag in row["tags"]]) for row in rows]
        pieces = list(self._pieces(rows, coder))
        self._missing = sum(map(len, tags)) - sum(len(piece.words) for piece in pieces)
        return [self._example(piece, tags[piece.row][piece.words], weights, coder) for piece in pieces]

    def notes(self) -> list[str]:
        if not self._missing:
            return []
        return [f"{self._missing:,} words beyond {self.options.length} tokens were left out: --stride N cuts long sentences into pieces"]

    def _pieces(self, rows: Sequence[Row], coder: Coder) -> Iterator[Piece]:
        for number, row in enumerate(rows):
            words = coder.words(row["words"])
            pieces = words.pieces(coder.length - coder.frame, self.options.stride)
            for piece, told in zip(pieces, homes(pieces), strict=True):
                framed = coder.framed(words.cut(piece))
                yield Piece(number, told, framed, framed.starts[0] + words.places(piece)[told - piece.start])

    @staticmethod
    def _example(piece: Piece, targets: np.ndarray, weights: np.ndarray, coder: Coder) -> Example:
        fields = coder.fields(piece.framed)
        of_tokens, weighed = np.zeros(len(piece.framed.tokens), np.int64), np.zeros(len(piece.framed.tokens))
        of_tokens[piece.places], weighed[piece.places] = targets, weights[targets]
        return fields | {"targets": of_tokens, "weights": weighed}

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[list[str]]:
        """A tag for each word; O for those that were not read."""
        labels, pieces = self.facts["labels"], list(self._pieces(rows, coder))
        found = [["O"] * len(row["words"]) for row in rows]
        examples = [coder.fields(piece.framed) for piece in pieces]
        for numbers, _, state in forward(model, config, examples, self.batch):
            best = model.head.scores(state).argmax(-1).cpu().numpy()
            for number, of_tokens in zip(numbers, best, strict=True):
                piece = pieces[number]
                for word, label in zip(piece.words, of_tokens[piece.places], strict=True):
                    found[piece.row][word] = labels[label]
        return found

    def score(self, rows: Sequence[Row], predictions: Sequence[list[str]]) -> Scored:
        gold = [row["tags"] for row in rows]
        counts = entity_counts(predictions, gold)
        right = np.array([sum(a == b for a, b in zip(guess, tags, strict=True)) for guess, tags in zip(predictions, gold, strict=True)])
        lengths = np.array([len(tags) for tags in gold])
        metrics = [
            Metric("f1", lambda chosen: f1_of(counts[chosen])),
            Metric("precision", lambda chosen: _share(counts[chosen, 0], counts[chosen, 1])),
            Metric("recall", lambda chosen: _share(counts[chosen, 0], counts[chosen, 2])),
            Metric("word_accuracy", lambda chosen: _share(right[chosen], lengths[chosen])),
        ]
        shown = [" ".join(row["words"]) for row in rows]
        guessed, told = ([_told(row["words"], tags) for row, tags in zip(rows, side, strict=True)] for side in (predictions, gold))
        good = np.array([f1_of(own[None]) if own[1:].any() else 1.0 for own in counts])
        return Scored(metrics, shown, guessed, told, good)

    def baseline(self, rows: Sequence[Row]) -> Sequence[list[str]]:
        """No entity anywhere."""
        return [["O"] * len(row["words"]) for row in rows]


def check_lists(rows: Sequence[Row], name: str) -> None:
    """Raise `UserError` unless every row has words, and a BIO tag for each."""
    for number, row in enumerate(rows, 1):
        where = f"{name}, example {number}"
        for role in ("words", "tags"):
            values = row[role]
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise UserError(
                    f"{where}: its {role} are {str(values)[:60]!r}: expected a list of texts; name another with --columns {role}=COLUMN"
                )
        if len(row["words"]) != len(row["tags"]) or not row["words"]:
            raise UserError(f"{where}: {len(row['words'])} words and {len(row['tags'])} tags: expected as many of each, at least one")
        wrong = next((tag for tag in row["tags"] if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) < 3)), None)
        if wrong is not None:
            raise UserError(f"{where}: tag {wrong!r} is none of BIO: expected O, or B- or I- and the entity's type, such as B-person")


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else 0.0


def _told(words: Sequence[str], tags: Sequence[str]) -> str:
    """The entities as a reader wants them, such as `Rick and Morty (creative-work)`."""
    return ", ".join(f"{' '.join(words[start:stop])} ({kind})" for kind, start, stop in entities(tags))
