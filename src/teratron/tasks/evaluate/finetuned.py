"""A run of `teratron finetune`, evaluated on other rows of its task."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from teratron.config import UserError
from teratron.tasks.evaluate.report import Report
from teratron.tasks.evaluate.task import SHOWN, Mistake
from teratron.tasks.finetune.judge import judge
from teratron.tasks.finetune.prepare import load_task
from teratron.tasks.finetune.rows import find_columns, read_table


def evaluate_run(
    name: str, run: Path, file: Path, columns: Mapping[str, str], limit: int, seed: int, batch: int, device: torch.device
) -> Report:
    """Its best checkpoint on the rows of a file, beside the task's baseline.

    Args: columns: by their roles, where their names are unusual. seed: of the intervals' draws. batch: examples of one forward pass.
    Raises `UserError` for a run of another task, and for rows that do not fit it.
    """
    begun = time.perf_counter()
    task = load_task(run)
    if task.name != name:
        raise UserError(f"{run}: was fine-tuned for {task.name}, not for {name}: type `teratron eval {run} {task.name} --data {file}`")
    table = task.read(find_columns(read_table([file], task.parallel_text), task.columns, columns, task.optional))
    task.check(table.rows, table.name)
    judged = judge(run, table.rows[: limit or None], device, seed, batch)
    scored = judged.scored
    missed = [int(n) for n in np.argsort(scored.good, kind="stable") if scored.good[n] < 1]
    wrong = tuple(Mistake(scored.shown[n], scored.gold[n], scored.predicted[n]) for n in missed[:SHOWN])
    facts: dict[str, str | int | float] = {f"baseline {metric}": value for metric, value in judged.baseline.items()}
    facts |= {"step": judged.step} | ({"examples left out": len(table.rows) - judged.count} if judged.count < len(table.rows) else {})
    return Report(name, str(file), judged.count, judged.metrics, facts, wrong, len(missed), time.perf_counter() - begun)
