"""An evaluation: a task run on a file, its metrics with confidence intervals, and the record that is kept of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from teratron.checkpoint.format import write_synced
from teratron.config import UserError
from teratron.tasks.evaluate.likelihood import Scorer
from teratron.tasks.evaluate.task import SHOWN, Mistake, Task
from teratron.tasks.metrics import Estimate, estimate


@dataclass(frozen=True)
class Report:
    """What one task came to on one file."""

    task: str
    file: str
    count: int
    metrics: dict[str, Estimate]
    facts: dict[str, str | int | float]
    wrong: tuple[Mistake, ...]
    wrong_count: int | None
    seconds: float


def evaluate(
    name: str,
    task: Task,
    file: Path,
    scorer: Scorer,
    limit: int = 0,
    seed: int = 0,
    done: Callable[[float], None] = lambda share: None,
) -> Report:
    """Run a task on a file.

    Args: limit: take the first examples only; 0 = all. seed: of the intervals' draws. done: told which further share is done.
    Raises `UserError` for data, or a model, that the task cannot have.
    """
    begun = time.perf_counter()
    there = task.read(file, scorer)
    examples = there[: limit or None]
    if not examples:
        raise UserError(f"--data {file}: holds no example")
    answers = task.run(scorer, examples, done)
    score = task.score(examples, answers)
    metrics = {metric.name: estimate(metric, score.count, seed) for metric in score.metrics}
    facts = score.facts | ({"examples left out": len(there) - len(examples)} if len(examples) < len(there) else {})
    return Report(name, str(file), score.count, metrics, facts, tuple(score.wrong[:SHOWN]), score.wrong_count, time.perf_counter() - begun)


def write_json(reports: Sequence[Report], model: str, path: Path) -> None:
    """All reports as one JSON object; what is no number is null."""
    content = {"model": model, "interval": "95 %, bootstrap", "results": [_plain(asdict(report)) for report in reports]}
    write_synced(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
