"""`teratron finetune` from its files to its scores: prepare, train, judge; with several seeds their mean and deviation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from teratron.tasks.finetune.judge import Judgement, judge, write_judgement
from teratron.tasks.finetune.prepare import Job, prepare

SCORES, SEEDS = "scores.json", "seeds.json"
Train = Callable[[Path, Path], int]
"""Trains as a config file says, in a run folder; returns an exit code."""


def finetune(job: Job, run: Path, train: Train, device: torch.device) -> int:
    """All seeds of a job, judged on a device; returns the exit code of the first training that did not come to its end, else 0."""
    folders = [run / f"seed-{number}" for number in range(1, job.seeds + 1)] if job.seeds > 1 else [run]
    first = job.seed
    found = []
    for number, folder in enumerate(folders):
        prepared = prepare(dataclasses.replace(job, overrides={**job.overrides, "train.seed": first + number}), folder, print)
        code = train(prepared.file, folder)
        if code:
            return code
        table = prepared.tables["test"]
        judgement = judge(folder, table.rows, device)
        write_judgement(folder / SCORES, judgement)
        print(f"{table.name}: {judgement.count:,} examples, with the weights of step {judgement.step:,}")
        print(judgement.told())
        print(f"scores and predictions: {folder / SCORES}")
        found.append(judgement)
    if len(found) > 1:
        _tell_seeds(run, found)
    return 0


def _tell_seeds(run: Path, found: Sequence[Judgement]) -> None:
    """The mean and the deviation of each metric over the seeds."""
    table = {name: np.array([judgement.metrics[name].value for judgement in found]) for name in found[0].metrics}
    content = {name: {"mean": values.mean(), "deviation": values.std(ddof=1), "values": values.tolist()} for name, values in table.items()}
    (run / SEEDS).write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(found)} seeds:")
    for name, values in table.items():
        print(f"{name:{max(map(len, table))}}  {values.mean():.4f} +- {values.std(ddof=1):.4f}")
