"""What a task is: columns, examples, a head and an objective, and how its predictions are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from teratron.checkpoint.source import Weights, load_entries
from teratron.config import Config, UserError
from teratron.data.examples import Example, Examples
from teratron.data.special import SpecialTokens
from teratron.models import Model, build_model
from teratron.objectives import Batch, build_objective
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.metrics import Metric

BATCH = 32
"""Examples of one forward pass when predictions are made, unless another number is asked for."""


@dataclass(frozen=True)
class Options:
    """What the command line says about a task."""

    length: int
    """Longest sequence, in tokens."""
    stride: int = 0
    """Tokens that neighbouring pieces of a long document share; 0 = a document is cut off at the length."""
    class_weights: str = "none"
    """none, or balanced: rare classes weigh more, by the inverse of how many examples they have."""
    target_length: int = 0
    """Longest text that is written, in tokens; 0 = 128, but no more than half of the positions that the model has."""
    beams: int = 1
    """Of the search that writes predictions; 1 = always the likeliest token."""
    template: str = "auto"
    """How a conversation is written down; auto = what the tokenizer's tokens suggest."""
    pack: bool = False
    """Several conversations make one example, without seeing each other."""
    group: int = 16
    """Pairs that are told apart from each other."""
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, least in (("stride", 0), ("target_length", 0), ("beams", 1), ("group", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Scored:
    """Predictions beside what would have been right, one a row."""

    metrics: list[Metric]
    shown: list[str]
    """What was read."""
    predicted: list[str]
    gold: list[str]
    good: np.ndarray
    """From 0 (wrong) to 1 (right), float [N]."""


@dataclass
class Task:
    """The base; `facts` are what was learnt from the training rows, such as the labels, and are kept with the run."""

    options: Options
    facts: dict[str, Any] = field(default_factory=dict)
    batch: int = BATCH
    """Examples of one forward pass when predictions are made; changes numbers by rounding only."""

    name: ClassVar[str]
    summary: ClassVar[str]
    families: ClassVar[tuple[str, ...]] = ("encoder", "gpt", "encoder_decoder", "xlnet")
    objective: ClassVar[str]
    columns: ClassVar[Mapping[str, Sequence[str]]]
    """The task's own names of columns and the usual ones, the likeliest first."""
    optional: ClassVar[Sequence[str]] = ()
    parallel_text: ClassVar[bool] = False
    usual_batch: ClassVar[int] = 32
    """Examples of one step."""
    takes: ClassVar[Sequence[str]] = ()
    """Which of the options concern it, beside length and seed."""

    @classmethod
    def read(cls, table: Table) -> Table:
        """A table's rows as the task has them, where not all are examples or one is several."""
        return table

    def learn(self, rows: Sequence[Row]) -> None:
        """Fill `facts` from the training rows; raises `UserError` for rows that cannot be learned from."""

    def check(self, rows: Sequence[Row], name: str) -> None:
        """Raise `UserError` for rows of a file that have what training has not seen."""

    def keys(self) -> dict[str, Any]:
        """Keys of the config that follow from the task and its facts."""
        return {}

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        """What is learnt, at least one example for each row unless rows are packed."""
        raise NotImplementedError

    def referred(self, examples: dict[str, list[Example]], source: Weights | None, config: Config) -> dict[str, list[Example]]:
        """Train's and valid's examples with what the model says of them that is begun with; source None = weights are drawn."""
        return examples

    def notes(self) -> list[str]:
        """What the last call of `examples` had to do to the rows, such as how many were cut."""
        return []

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[Any]:
        """A prediction for each row."""
        raise NotImplementedError

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scored:
        """How good predictions are."""
        raise NotImplementedError

    def baseline(self, rows: Sequence[Row]) -> Sequence[Any]:
        """What somebody would predict who has not read the rows: the commonest class, a copy ..."""
        raise NotImplementedError


def whole_model(source: Weights, device: torch.device) -> Model:
    """A model with its weights in float32, to be used and not to learn."""
    model = build_model(source.config)
    load_entries(model, source.parts)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def forward(
    model: Model, config: Config, examples: Sequence[Example], size: int = BATCH
) -> Iterator[tuple[np.ndarray, Batch, dict[str, Tensor]]]:
    """The model's last state on examples, `size` at a time: (their numbers, the batch, the state), longest together to spare padding."""
    held, objective = Examples.of(examples), build_objective(config)
    order, device = np.argsort(held.lengths, kind="stable"), device_of(model)
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        batch = {name: tensor.to(device) for name, tensor in objective.prepare(held, numbers, SpecialTokens(0)).items()}
        yield numbers, batch, model(objective.inputs(batch))


def device_of(model: Model) -> torch.device:
    """Where its weights are."""
    return next(model.parameters()).device


def weights_of(counts: Sequence[int], kind: str) -> np.ndarray:
    """What an example of each class weighs, by how many there are: `class_weights` none or balanced, float64 [C]."""
    found = np.maximum(np.array(counts, float), 1)
    return found.sum() / found / len(found) if kind == "balanced" else np.ones(len(found))


def text_of(row: Row, role: str, name: str) -> str:
    """A column's text; raises `UserError` where it is none."""
    value = row[role]
    if not isinstance(value, (str, int, float)):
        raise UserError(f"--data: {name} has a {type(value).__name__} in column '{role}', expected text: name another with --columns")
    return str(value)
