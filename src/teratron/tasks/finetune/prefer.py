"""`prefer`: of two answers to a prompt the better one becomes likelier than the model began with (DPO, Rafailov et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from teratron.checkpoint.exchange import open_weights
from teratron.checkpoint.source import Weights
from teratron.config import Config, UserError
from teratron.data.examples import Example, side_by_side
from teratron.models import Model
from teratron.objectives.compared import answer_scores
from teratron.tasks.finetune.chat import conversation, fitted
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.conversations import messages_of
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import BATCH, Scored, Task, device_of, forward, whole_model
from teratron.tasks.finetune.templates import Turn, Writer, template_of
from teratron.tasks.metrics import Metric


class Prefer(Task):
    """The prompt with the chosen answer is segment 0 of an example, that with the rejected one segment 1."""

    name = "prefer"
    summary = "of two answers the better one becomes likelier (DPO)"
    families = ("gpt",)
    objective = "preferred"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {
        "prompt": ("prompt", "question", "instruction", "input"),
        "chosen": ("chosen", "preferred", "better"),
        "rejected": ("rejected", "dispreferred", "worse"),
    }
    optional = ("prompt",)
    takes = ("template",)

    @classmethod
    def read(cls, table: Table) -> Table:
        """Rows of `messages`, which a user ends, and two texts, `chosen` and `rejected`."""
        rows = [_row(row, f"--data {table.name}, example {number}") for number, row in enumerate(table.rows, 1)]
        return Table(table.name, rows, table.notes)

    def keys(self) -> dict[str, Any]:
        """What the model began with is asked without dropout, so that what it becomes is, too."""
        return {"model.dropout": 0.0}

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        writer, cut, examples = Writer(template_of(self.options.template, coder.tokenizer), coder.tokenizer), 0, list[Example]()
        for row in rows:
            whole = [writer.turns([*row["messages"], {"role": "assistant", "content": row[side]}]) for side in ("chosen", "rejected")]
            turns = _alike(whole, coder.length + 1 - len(writer.begin))
            cut += total(turns) < total(whole)
            examples.append(side_by_side([conversation(writer.begin, side, len(side) - 1) for side in turns]))
        self._notes = [f"{cut:,} too long: they lost their oldest turns, or the end of a text"] if cut else []
        return examples

    def notes(self) -> list[str]:
        return self._notes

    def referred(self, examples: dict[str, list[Example]], source: Weights | None, config: Config) -> dict[str, list[Example]]:
        """The log-probability of each answer by the model that is begun with, at the answer's first token."""
        if source is None:
            raise UserError("--scratch: prefer compares with the model that it begins with, which drawn weights are not: leave it out")
        model = whole_model(source, torch.device("cpu"))  # rounded alike on every device, so that the run goes on anywhere
        return {name: _with_references(found, answers(model, config, found)) for name, found in examples.items()}

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[np.ndarray]:
        """By how much the chosen answer is likelier than the rejected one: by the model, and by the one that it began with, [2] in nats."""
        examples, first = self.examples(rows, coder), whole_model(open_weights(Path(config.train.init)), device_of(model))
        own, begun = (answers(one, config, examples, self.batch) @ [1.0, -1.0] for one in (model, first))
        self._begun = begun
        return list(np.stack([own, begun], axis=1))

    def score(self, rows: Sequence[Row], predictions: Sequence[np.ndarray]) -> Scored:
        own, begun = np.array(predictions).T
        good = (own > begun).astype(float)
        metrics = [Metric.mean("likelier", own > 0)]
        if (own != begun).any():
            metrics += [Metric.mean("accuracy", good), Metric.mean("margin", own - begun)]
        shown = ["\n".join(f"{message['role']}: {message['content']}" for message in row["messages"]) for row in rows]
        guessed = [row["chosen" if gap > 0 else "rejected"] for row, gap in zip(rows, own, strict=True)]
        return Scored(metrics, shown, guessed, [row["chosen"] for row in rows], good)

    def baseline(self, rows: Sequence[Row]) -> Sequence[np.ndarray]:
        """What the model says that was begun with, of the rows that were predicted last."""
        return list(np.stack([self._begun, self._begun], axis=1))


@torch.no_grad()
def answers(model: Model, config: Config, examples: Sequence[Example], size: int = BATCH) -> np.ndarray:
    """Log-probabilities of the chosen and the rejected answer of each example, float64 [N, 2]."""
    found = np.zeros((len(examples), 2))
    for numbers, batch, state in forward(model, config, examples, size):
        found[numbers] = answer_scores(model, state["hidden"], batch).double().cpu().numpy()
    return found


def _with_references(examples: Sequence[Example], found: np.ndarray) -> list[Example]:
    return [{**example, "references": _at_answers(example, scores)} for example, scores in zip(examples, found, strict=True)]


def _at_answers(example: Example, scores: np.ndarray) -> np.ndarray:
    places = np.zeros(len(example["tokens"]))
    for segment, score in enumerate(scores):
        places[np.argmax((example["segments"] == segment) & (example["weights"] > 0))] = score
    return places


def total(sides: Sequence[list[Turn]]) -> int:
    """Tokens of several conversations."""
    return sum(turn.size for side in sides for turn in side)


def _alike(sides: Sequence[list[Turn]], room: int) -> list[list[Turn]]:
    """Both conversations in at most `room` tokens, the prompt the same in both."""
    answer = max(side[-1].size for side in sides)
    prompt = fitted(sides[0][:-1], max(room - answer, room // 2))
    return [fitted([*prompt, side[-1]], room) for side in sides]


def _row(row: Row, name: str) -> Row:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):  # whole conversations that differ in the last turn
        chosen, rejected = (messages_of(side, name) for side in (chosen, rejected))
        return {"messages": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    prompt: Any = row.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else None
    if isinstance(prompt, list):
        messages = messages_of([*prompt, {"role": "assistant", "content": ""}], name)[:-1]
    if messages is None or not isinstance(chosen, str) or not isinstance(rejected, str):
        raise UserError(
            f"{name}: expected a prompt (a text or messages) with the texts chosen and rejected, or two lists of messages, found "
            f"{str(row)[:80]}: correct it"
        )
    return {"messages": messages, "chosen": chosen, "rejected": rejected}
