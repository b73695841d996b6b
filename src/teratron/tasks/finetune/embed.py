"""`embed`: vectors of texts, near each other where the texts belong together (Gao et al. 2021)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from teratron.checkpoint.source import Weights
from teratron.config import Config, UserError
from teratron.data.examples import Example, side_by_side
from teratron.data.order import permute
from teratron.models import Model
from teratron.objectives.compared import vectors_of
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import BATCH, Scored, Task, forward, text_of
from teratron.tasks.metrics import Metric, ndcg, recall_at, reciprocal_rank, spearman

ALIKE = ("entailment", "duplicate", "paraphrase", "1", "true", "yes")
"""Labels of pairs that belong together."""
ENOUGH = 0.8
"""Share of the highest score from which on a pair is learned from."""
FEATURES = 8192
"""Most features of the baseline's vectors."""


class Embed(Task):
    """A text's vector is the mean of its tokens' last states. Pairs of one example are told apart; without pairs each text is its own."""

    name = "embed"
    summary = "vectors of texts, for similarity and retrieval"
    families = ("encoder", "gpt", "xlnet")
    objective = "similar"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {
        "text": ("anchor", "sentence1", "premise", "question1", "query", "question", "text", "sentence", "source"),
        "positive": ("positive", "sentence2", "hypothesis", "question2", "duplicate", "answer", "pair", "target"),
        "label": ("label", "is_duplicate"),
        "score": ("score", "similarity"),
    }
    optional = ("positive", "label", "score")
    parallel_text = True
    takes = ("group",)
    usual_batch = 2

    @classmethod
    def read(cls, table: Table) -> Table:
        """Rows of `text`, and of `positive` and `score` or None; pairs whose label says that they differ are left out."""
        rows = [_row(row, f"--data {table.name}, example {number}") for number, row in enumerate(table.rows, 1)]
        labels = Counter(row["label"] for row in rows)
        if set(labels) == {None}:
            return Table(table.name, rows, table.notes)
        kept = [row for row in rows if row["label"] in ALIKE]
        if not kept:
            raise UserError(
                f"--data {table.name}: its labels are {', '.join(map(str, labels))}: expected {', '.join(ALIKE)} for texts that belong "
                "together: rename them, or name another column with --columns label=COLUMN"
            )
        return Table(table.name, kept, [*table.notes, f"{len(kept):,} of {len(rows):,} rows belong together by their label"])

    def learn(self, rows: Sequence[Row]) -> None:
        scores = [row["score"] for row in rows if row["score"] is not None]
        self.facts = {"enough": ENOUGH * max(scores) if scores else None, "pairs": rows[0]["positive"] is not None}
        if len(self._pairs(rows)) < 2:
            raise UserError(f"--data: {len(self._pairs(rows))} pairs belong together, expected two at least: give more examples")

    def _pairs(self, rows: Sequence[Row]) -> list[Row]:
        """Rows to learn from."""
        enough = self.facts["enough"]
        return [row for row in rows if enough is None or row["score"] is None or row["score"] >= enough]

    def keys(self) -> dict[str, Any]:
        return {"model.head": "none"}

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        pairs = self._pairs(rows)
        sides = [coder.encode([row[role] or row["text"] for row in pairs]) for role in ("text", "positive")]
        room = coder.length - coder.frame
        self._cut = sum(len(text) > room for side in sides for text in side)
        order = permute(np.arange(len(pairs)), len(pairs), self.options.seed)
        groups = np.array_split(order, max(1, -(-len(pairs) // self.options.group)))
        return [side_by_side([_segment(side[number], coder) for number in group for side in sides]) for group in groups]

    def referred(self, examples: dict[str, list[Example]], source: Weights | None, config: Config) -> dict[str, list[Example]]:
        if not self.facts["pairs"] and not config.model.dropout:
            raise UserError("model.dropout = 0.0: without a column of positives only dropout makes two readings of a text differ: raise it")
        return examples

    def notes(self) -> list[str]:
        return [f"{self._cut:,} texts longer than {self.options.length} tokens were cut"] if self._cut else []

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[np.ndarray]:
        """Unit vectors of both texts, [2, H]."""
        texts = ([row[role] or row["text"] for row in rows] for role in ("text", "positive"))
        sides = [vectors(model, config, side, coder, self.batch) for side in texts]
        return list(np.stack(sides, axis=1))

    def score(self, rows: Sequence[Row], predictions: Sequence[np.ndarray]) -> Scored:
        first, second = np.stack(list(predictions), axis=1)
        cosines = first @ second.T
        texts, positives = ([row[role] or row["text"] for row in rows] for role in ("text", "positive"))
        if rows[0]["positive"] is None:
            np.fill_diagonal(cosines, -np.inf)  # a text finds itself; what is said of others is how alike all of them are
            others = [Metric.mean("mean_cosine", np.where(np.isfinite(cosines), cosines, 0).sum(1) / max(1, len(rows) - 1))]
            return Scored(others, texts, [positives[n] for n in cosines.argmax(1)], [""] * len(rows), np.zeros(len(rows)))
        asked = np.isin(np.arange(len(rows)), [n for n, row in enumerate(rows) if self._pairs([row])])
        relevant = ((_same(texts) | _same(positives)) & asked).astype(float)
        values = {"mrr": reciprocal_rank(cosines, relevant), "ndcg@10": ndcg(cosines, relevant)}
        values |= {f"recall@{k}": recall_at(cosines, relevant, k) for k in (1, 10)}
        metrics = [_mean_of(name, np.where(asked, found, np.nan)) for name, found in values.items()]
        if all(row["score"] is not None for row in rows):
            own, gold = cosines.diagonal(), np.array([row["score"] for row in rows])
            metrics.append(Metric("spearman", lambda chosen: spearman(own[chosen], gold[chosen])))
        return Scored(metrics, texts, [positives[number] for number in cosines.argmax(1)], positives, values["recall@1"])

    def baseline(self, rows: Sequence[Row]) -> Sequence[np.ndarray]:
        """Words in common, the rarer the more (tf-idf)."""
        sides = [[_words(row[role] or row["text"]) for row in rows] for role in ("text", "positive")]
        counts = Counter(word for side in sides for words in side for word in set(words))
        number = {word: place % FEATURES for place, word in enumerate(counts)}
        found = np.zeros((len(rows), 2, min(len(counts), FEATURES)), np.float32)
        for side, texts in enumerate(sides):
            for row, words in enumerate(texts):
                for word in words:
                    found[row, side, number[word]] += np.log((1 + 2 * len(rows)) / (1 + counts[word])) + 1
        return list(found / np.maximum(np.linalg.norm(found, axis=2, keepdims=True), 1e-9))


@torch.no_grad()
def vectors(model: Model, config: Config, texts: Sequence[str], coder: Coder, size: int = BATCH) -> np.ndarray:
    """Unit vectors of texts, float32 [N, H]."""
    found = np.zeros((len(texts), config.model.hidden), np.float32)
    examples = [side_by_side([_segment(text, coder)]) for text in coder.encode(texts)]
    for numbers, batch, state in forward(model, config, examples, size):
        found[numbers] = vectors_of(model, state, batch)[:, 0].float().cpu().numpy()
    return found


def _segment(text: np.ndarray, coder: Coder) -> Example:
    fields = coder.fields(coder.framed(text))
    return {**fields, "vector_weights": np.full(len(fields["tokens"]), 1 / len(fields["tokens"]))}


def _row(row: Row, name: str) -> Row:
    label, score = row.get("label"), row.get("score")
    try:
        graded = None if score is None else float(score)
    except (TypeError, ValueError):
        raise UserError(
            f"{name}: its score is {str(score)[:40]!r}, expected a number: name another column with --columns score=COLUMN"
        ) from None
    positive = text_of(row, "positive", name) if row.get("positive") is not None else None
    return {
        "text": text_of(row, "text", name),
        "positive": positive,
        "label": None if label is None else str(label).lower(),
        "score": graded,
    }


def _same(texts: Sequence[str]) -> np.ndarray:
    _, number = np.unique(list(texts), return_inverse=True)
    return number[:, None] == number[None]


def _mean_of(name: str, values: np.ndarray) -> Metric:
    """The mean of the values that are there."""
    return Metric(name, lambda chosen: float(np.nanmean(values[chosen])) if np.isfinite(values[chosen]).any() else float("nan"))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
