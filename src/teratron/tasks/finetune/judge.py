"""A fine-tuned run judged: predictions of its best checkpoint, metrics with intervals beside the baseline, and what went wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teratron.checkpoint import newest_checkpoint, open_checkpoint, saved_state
from teratron.checkpoint.exchange import open_weights
from teratron.config import Config, UserError
from teratron.models import Model
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.prepare import load_task, run_tokenizer
from teratron.tasks.finetune.rows import Row
from teratron.tasks.finetune.task import BATCH, Scored, whole_model
from teratron.tasks.metrics import Estimate, estimate


@dataclass(frozen=True)
class Judgement:
    """How good a run is on some rows."""

    scored: Scored
    metrics: dict[str, Estimate]
    baseline: dict[str, float]
    """The same metrics of what the task's baseline predicts."""
    step: int
    count: int

    def told(self) -> str:
        """One line a metric."""
        width = max(map(len, self.metrics))
        lines = []
        for name, found in self.metrics.items():
            beside = f"  baseline {self.baseline[name]:.4f}" if name in self.baseline else ""
            lines.append(f"{name:{width}}  {found.value:.4f}  ({found.low:.4f} to {found.high:.4f}){beside}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        metrics = {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in self.metrics.items()}
        return {"step": self.step, "examples": self.count, "metrics": metrics, "baseline": self.baseline}


def judge(run: Path, rows: Sequence[Row], device: torch.device, seed: int = 0, batch: int = BATCH) -> Judgement:
    """Predictions of a run's best checkpoint on rows, scored; seed: of the intervals' draws; batch: examples of one forward pass."""
    task, (model, config, step) = load_task(run), best_model(run, device)
    task.batch = batch
    coder = Coder(run_tokenizer(run), config.model, task.options.length)
    scored = task.score(rows, task.predict(model, config, rows, coder))
    dull = task.score(rows, task.baseline(rows))
    metrics = {metric.name: estimate(metric, len(rows), seed) for metric in scored.metrics}
    baseline = {metric.name: metric.of(np.arange(len(rows))) for metric in dull.metrics}
    return Judgement(scored, metrics, baseline, step, len(rows))


def best_model(run: Path, device: torch.device) -> tuple[Model, Config, int]:
    """The model of a run's best checkpoint, or of its newest where no evaluation was compared: (model, config, step)."""
    newest = newest_checkpoint(run, print)
    if newest is None:
        raise UserError(f"{run}: holds no checkpoint: fine-tune first, with `teratron finetune ... --run {run}`")
    best = saved_state(newest).best[1:]
    if best and best[0] != newest.step:
        newest = open_checkpoint(run / "checkpoints" / f"step-{int(best[0]):08d}")
    return whole_model(open_weights(newest.folder), device), newest.config(), newest.step


def write_judgement(path: Path, judgement: Judgement) -> None:
    """Write metrics and predictions as JSON."""
    scored = judgement.scored
    rows = zip(scored.shown, scored.predicted, scored.gold, scored.good.tolist(), strict=True)
    examples = [{"text": shown, "predicted": predicted, "gold": gold, "good": good} for shown, predicted, gold, good in rows]
    path.write_text(json.dumps(judgement.as_json() | {"predictions": examples}, ensure_ascii=False, indent=1) + "\n", "utf-8")
