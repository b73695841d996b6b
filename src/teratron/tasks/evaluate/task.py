"""What a task is: it reads examples, has a model answer them, and scores the answers. `TASKS` in `__init__` names them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from teratron.tasks.evaluate.likelihood import Scorer
from teratron.tasks.metrics import Metric

SHOWN = 50
"""Of the examples that went wrong, as many are reported."""


@dataclass(frozen=True)
class Options:
    """What is asked of tasks beside model and data, in tokens or words."""

    stride: int = 0
    """Of perplexity: tokens by which windows advance; 0 = half a window."""
    detokenise: str = ""
    """Of perplexity: how the text was cut into words that are to be joined again, such as wikitext."""


@dataclass(frozen=True)
class Mistake:
    """An example that went wrong, in texts to read."""

    question: str
    expected: str
    found: str


@dataclass(frozen=True)
class Score:
    """What came out."""

    metrics: Sequence[Metric]
    count: int
    """Examples, which the metrics' numbers go up to."""
    wrong: Sequence[Mistake] = ()
    """The examples that went wrong, those to look at first in front; not more than `SHOWN` are needed."""
    wrong_count: int | None = None
    """How many went wrong in all; None = the examples are not right or wrong."""
    facts: dict[str, str | int | float] = field(default_factory=dict)
    """What a reader must know beside the metrics, such as the chance level, by name."""


class Task(Protocol):
    """A way to evaluate. Its class's first docstring line tells what it does."""

    def __init__(self, options: Options) -> None: ...

    def read(self, file: Path, scorer: Scorer) -> list[Any]:
        """The examples of a file. Raises `UserError` that names what is not as expected."""

    def run(self, scorer: Scorer, examples: Sequence[Any], done: Callable[[float], None]) -> list[Any]:
        """The model's answer to each example; `done` is told which further share is done."""

    def score(self, examples: Sequence[Any], answers: Sequence[Any]) -> Score:
        """The metrics of the answers."""
