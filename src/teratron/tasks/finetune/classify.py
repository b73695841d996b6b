"""`classify`: one or two sentences, or a long document by pieces, have one of several labels; sentiment is an instance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from teratron.config import Config, UserError, nearest
from teratron.data.examples import Example
from teratron.models import Model
from teratron.objectives.given import pooled_scores
from teratron.tasks.finetune.coder import Coder, Framed
from teratron.tasks.finetune.rows import Row
from teratron.tasks.finetune.task import Scored, Task, forward, text_of, weights_of
from teratron.tasks.metrics import Metric, calibration_error, f1, matthews


class Classify(Task):
    """The label of a document in pieces is that of their mean log-probability."""

    name = "classify"
    summary = "a label for one text or two (sentiment, intent, inference); long documents by pieces with --stride"
    objective = "classes"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {
        "text": ("text", "sentence", "sentence1", "premise", "review", "question1", "question", "content"),
        "pair": ("pair", "text_pair", "sentence2", "hypothesis", "question2"),
        "label": ("label", "category", "intent", "class", "sentiment", "target"),
    }
    optional = ("pair",)
    takes = ("stride", "class_weights")

    def learn(self, rows: Sequence[Row]) -> None:
        counts = Counter(str(row["label"]) for row in rows)
        if len(counts) < 2:
            raise UserError(f"--data: every example has the label {next(iter(counts))!r}: expected two labels at least")
        if len(counts) > len(rows) / 2 and len(rows) > 20:
            raise UserError(
                f"--data: {len(counts):,} different labels for {len(rows):,} examples, such as {next(iter(counts))!r}: is it the column of "
                "labels? Name it with --columns label=COLUMN"
            )
        self.facts = {"labels": sorted(counts), "counts": [counts[label] for label in sorted(counts)]}

    def check(self, rows: Sequence[Row], name: str) -> None:
        labels = self.facts["labels"]
        for number, row in enumerate(rows, 1):
            if str(row["label"]) not in labels:
                raise UserError(
                    f"{name}, example {number}: label {row['label']!r} is unseen in training{nearest(str(row['label']), labels)}: add "
                    "examples of it to --data, or leave it out"
                )

    def keys(self) -> dict[str, object]:
        pooled = {"objective.name": "pooled"} if self.facts["pooled"] else {}
        keys = {"model.head": "classes", "model.classes": len(self.facts["labels"]), "model.class_bias": self.facts["bias"]}
        return {**keys, **pooled}

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        labels = {label: number for number, label in enumerate(self.facts["labels"])}
        weights = weights_of(self.facts["counts"], self.options.class_weights)
        self.facts["bias"] = coder.config.family != "gpt"  # decoders of other systems that classify texts have none
        self.facts["pooled"] = coder.config.family in ("encoder", "xlnet") and not coder.config.pooler
        pieces = self._pieces(rows, coder)
        return [
            self._example(piece, labels[str(row["label"])], weights[labels[str(row["label"])]] / len(found), coder)
            for row, found in zip(rows, pieces, strict=True)
            for piece in found
        ]

    def _pieces(self, rows: Sequence[Row], coder: Coder) -> list[list[Framed]]:
        """Each row's text, or both its texts, framed; of a long one several pieces where there is a stride."""
        texts = coder.encode([text_of(row, "text", f"example {number}") for number, row in enumerate(rows, 1)])
        others = coder.encode([text_of(row, "pair", "a row") for row in rows]) if rows[0].get("pair") is not None else None
        if others is not None:
            self._cut = sum(len(a) + len(b) + 2 + (coder.cls is not None) > coder.length for a, b in zip(texts, others, strict=True))
            return [[coder.framed(text, other)] for text, other in zip(texts, others, strict=True)]
        room, stride = coder.length - coder.frame, self.options.stride
        self._cut = 0 if stride else sum(len(text) > room for text in texts)
        return [[coder.framed(text[start : start + room]) for start in starts(len(text), room, stride)] for text in texts]

    def notes(self) -> list[str]:
        return [f"{self._cut:,} texts longer than {self.options.length} tokens were cut"] if self._cut else []

    def _example(self, piece: Framed, label: int, weight: float, coder: Coder) -> Example:
        if coder.start is not None:  # an encoder reads, and the decoder's first token has the class
            fields = {f"encoder_{name}": values for name, values in coder.fields(piece).items()}
            return fields | {"tokens": np.array([coder.start]), "targets": np.array([label]), "weights": np.array([weight])}
        if self.facts["pooled"]:
            first, share = np.arange(len(piece.tokens)) == 0, np.full(len(piece.tokens), 1 / len(piece.tokens))
            return coder.fields(piece) | {"targets": first * label, "weights": first * weight, "pool_weights": share}
        at = np.arange(len(piece.tokens)) == piece.mark
        return coder.fields(piece) | {"targets": at * label, "weights": at * weight}

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[np.ndarray]:
        """Log-probabilities of the labels."""
        pieces = self._pieces(rows, coder)
        owners = np.repeat(np.arange(len(rows)), [len(found) for found in pieces])
        examples = [self._example(piece, 0, 1.0, coder) for found in pieces for piece in found]
        sums = np.zeros((len(rows), len(self.facts["labels"])))
        for numbers, batch, state in forward(model, config, examples, self.batch):
            scores = pooled_scores(model, state, batch) if self.facts["pooled"] else model.head.scores(state)[batch["weights"] > 0]
            np.add.at(sums, owners[numbers], scores.double().log_softmax(-1).cpu().numpy())
        return list(sums / np.array([[len(found)] for found in pieces]))

    def score(self, rows: Sequence[Row], predictions: Sequence[np.ndarray]) -> Scored:
        labels = self.facts["labels"]
        scores = np.array(predictions)
        probabilities = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        predicted, gold = scores.argmax(1), np.array([labels.index(str(row["label"])) for row in rows])
        good = (predicted == gold).astype(float)
        metrics = [
            Metric.mean("accuracy", good),
            Metric("f1_macro", lambda chosen: f1(predicted[chosen], gold[chosen], "macro")),
            Metric("matthews", lambda chosen: matthews(predicted[chosen], gold[chosen])),
            Metric("calibration_error", lambda chosen: calibration_error(probabilities.max(1)[chosen], good[chosen])),
        ]
        shown = [" | ".join(str(row[role]) for role in ("text", "pair") if row.get(role) is not None) for row in rows]
        return Scored(metrics, shown, [labels[number] for number in predicted], [str(row["label"]) for row in rows], good)

    def baseline(self, rows: Sequence[Row]) -> Sequence[np.ndarray]:
        counts = np.array(self.facts["counts"], float)
        return [np.log(counts / counts.sum())] * len(rows)


def starts(length: int, room: int, stride: int) -> list[int]:
    """Where pieces of at most `room` tokens of a text begin, neighbours sharing `stride` tokens; with stride 0 the first alone."""
    if length <= room or not stride:
        return [0]
    step = room - stride
    return list(range(0, length - stride, step))
