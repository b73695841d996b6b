"""`seq2seq`: from a text to a text, such as its translation, its summary, or the answer to a question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from teratron.config import Config, UserError
from teratron.data.examples import Example
from teratron.models import Model
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import Scored, Task
from teratron.tasks.finetune.writing import room_to_write, written
from teratron.tasks.metrics import Metric, bleu, chrf, rouge

FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
"""The number with which an answer of GSM8K ends."""
SENTENCE = re.compile(r"(?<=[.!?。])\s+")


class Seq2Seq(Task):
    """An encoder reads source <end> and the decoder writes; a decoder alone goes on from source <end>, and learns the target only."""

    name = "seq2seq"
    summary = "from a text to a text: translation, summary, answer to a question"
    families = ("gpt", "encoder_decoder")
    objective = "supervised"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {
        "source": ("source", "src", "question", "document", "article", "text", "input", "prompt"),
        "target": ("target", "tgt", "answer", "summary", "highlights", "translation", "output", "completion"),
    }
    parallel_text = True
    takes = ("target_length", "beams")

    @classmethod
    def read(cls, table: Table) -> Table:
        """Rows of `source`, its first sentence as `lead`, and one or several texts as `target`; pairs with a blank side are left out."""
        rows = [_row(row, f"--data {table.name}, example {number}") for number, row in enumerate(table.rows, 1)]
        kept = [row for row in rows if row["source"].strip() and row["target"]]
        if not kept:
            raise UserError(f"--data {table.name}: no example has both a source and a target: give another file, or name --columns")
        blank = [f"{len(rows) - len(kept):,} without a source or a target left out"] if len(kept) < len(rows) else []
        return Table(table.name, kept, [*table.notes, *blank])

    def learn(self, rows: Sequence[Row]) -> None:
        numbers = Counter(_number(row["target"][0]) for row in rows)
        lengths = [np.median([len(text) for text in texts]) for texts in zip(*((r["source"], r["target"][0]) for r in rows), strict=True)]
        counted = numbers[None] < len(rows) / 2
        self.facts = {
            "shorter": bool(lengths[0] > 2 * lengths[1]),
            "number": next((found for found, _ in numbers.most_common() if found is not None), None) if counted else None,
        }

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        prompts, most = self._prompts(rows, coder), room_to_write(coder, self.options.target_length)
        targets = coder.encode([row["target"][0] for row in rows])
        self._cut += sum(len(target) > most for target in targets)
        return [self._example(prompt, target, most, coder) for prompt, target in zip(prompts, targets, strict=True)]

    def _prompts(self, rows: Sequence[Row], coder: Coder) -> list[np.ndarray]:
        """What is read of each row: its source, cut off where it is too long, and the end mark."""
        begin = [] if coder.tokenizer.bos is None else [coder.tokenizer.bos]
        positions, most = coder.config.positions, room_to_write(coder, self.options.target_length)
        room = min(coder.length, positions if coder.start is not None else positions - most) - len(begin) - 1
        if room < 1 or most >= positions:
            raise UserError(f"--target-length {most}: leaves no room in the model's {positions} positions: lower it")
        texts = coder.encode([row["source"] for row in rows])
        self._cut = sum(len(text) > room for text in texts)
        return [np.concatenate([begin, text[:room], [coder.end]]).astype(np.int64) for text in texts]

    def notes(self) -> list[str]:
        return [f"{self._cut:,} sources or targets were cut"] if self._cut else []

    @staticmethod
    def _example(prompt: np.ndarray, target: np.ndarray, most: int, coder: Coder) -> Example:
        answer = np.append(target, coder.end)[:most]  # of a target that is cut the end is not learned
        if coder.start is not None:
            fields = {"encoder_tokens": prompt, "tokens": np.append(coder.start, answer[:-1])}
            return fields | {"targets": answer, "weights": np.ones(len(answer))}
        tokens = np.concatenate([prompt, answer])
        return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": (np.arange(1, len(tokens)) >= len(prompt)).astype(float)}

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[str]:
        """What the model writes."""
        most = room_to_write(coder, self.options.target_length)
        return written(model, config, self._prompts(rows, coder), coder, most, self.options.beams, self.batch)

    def score(self, rows: Sequence[Row], predictions: Sequence[str]) -> Scored:
        references = [row["target"] for row in rows]
        characters = chrf(predictions, references)
        metrics = [bleu(predictions, references), characters, *rouge(predictions, references)[:3]]
        exact = [_plain(text) in map(_plain, rights) for text, rights in zip(predictions, references, strict=True)]
        metrics.append(Metric.mean("exact_match", exact))
        good = np.array([characters.of(np.array([number])) / 100 for number in range(len(rows))])
        if self.facts["number"] is not None:
            pairs = zip(predictions, references, strict=True)
            good = np.array([float(_number(text) is not None and _number(text) == _number(rights[0])) for text, rights in pairs])
            metrics.append(Metric.mean("number_accuracy", good))
        return Scored(metrics, [row["source"] for row in rows], list(predictions), [rights[0] for rights in references], good)

    def baseline(self, rows: Sequence[Row]) -> Sequence[str]:
        """A copy of the source, where targets are much shorter of its first sentence; and the commonest number."""
        copies = [row["lead"] if self.facts["shorter"] else row["source"] for row in rows]
        number = self.facts["number"]
        return copies if number is None else [f"{copy}\n#### {number}" for copy in copies]


def _row(row: Row, name: str) -> Row:
    source, target = (_texts(row[role], f"{name}: column '{role}'") for role in ("source", "target"))
    joined = " ".join(source)
    return {
        "source": joined,
        "lead": source[0] if len(source) > 1 else SENTENCE.split(joined)[0],
        "target": [t for t in target if t.strip()],
    }


def _texts(value: Any, name: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, (str, int, float)) for text in texts):
        raise UserError(f"{name}: found {str(value)[:60]!r}, expected a text or a list of texts: name another column with --columns")
    return [str(text) for text in texts]


def _number(text: str) -> str | None:
    found = FINAL.search(text)
    return f"{float(found[1].replace(',', '')):.12g}" if found else None


def _plain(text: str) -> str:
    return " ".join(text.split())
