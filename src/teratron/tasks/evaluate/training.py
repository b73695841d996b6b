"""Tasks measured in a training job: the engine's own forward pass scores the texts, so that it works on every layout."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teratron.config import UserError, nearest
from teratron.data.samples import Samples
from teratron.data.special import Needs, SpecialTokens
from teratron.data.tokenizer import Tokenizer
from teratron.generate.frame import frame_of
from teratron.models import Model, State
from teratron.objectives.terms import Batch, Term
from teratron.tasks.evaluate import TASKS, Options, Task
from teratron.tasks.evaluate.likelihood import Likelihood, Progress, Request, Scorer
from teratron.train.engine import Engine
from teratron.train.trainer import Examine

ROWS = 8
"""Requests of a forward pass where train.micro_batch says nothing."""


def examiner(engine: Engine, tokenizer: Tokenizer | None) -> Examine:
    """What measures a run on its `train.eval_tasks`. Raises `UserError` for tasks, files or models that do not fit."""
    train = engine.config.train
    if tokenizer is None:
        raise UserError("train.eval_tasks reads texts, and the data set does not say which tokenizer made it: set data.tokenizer")
    scorer = EngineScorer(engine, tokenizer)
    jobs: list[tuple[str, str, Task, Sequence[Any]]] = []
    for item in train.eval_tasks:
        name, _, file = item.partition(":")
        if name not in TASKS:
            raise UserError(f"train.eval_tasks = {item}: there is no task '{name}'{nearest(name, TASKS)}: expected {', '.join(TASKS)}")
        task = TASKS[name](Options())
        jobs.append((name, file, task, task.read(Path(file), scorer)[: train.eval_tasks_limit or None]))
    return lambda: (_measured(*job, scorer) for job in jobs)


def _measured(name: str, file: str, task: Task, examples: Sequence[Any], scorer: Scorer) -> dict[str, Any]:
    begun, every = time.perf_counter(), np.arange(len(examples))
    score = task.score(examples, task.run(scorer, examples, lambda share: None))
    metrics = {metric.name: metric.of(every) for metric in score.metrics}
    return {"task": name, "file": file, "examples": len(examples), "metrics": metrics, "seconds": time.perf_counter() - begun}


class EngineScorer(Scorer):
    """Scores with the model that a run is training; every rank asks for the same."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        config = engine.config
        super().__init__(config.model, frame_of(config.model.family, config.objective.name, tokenizer), "this run", engine.device)
        self.engine = engine

    def likelihoods(self, requests: Sequence[Request], done: Progress = lambda share: None) -> list[Likelihood]:
        """Without the likeliest tokens themselves."""
        self.check(requests)
        tally = self.engine.evaluate(self._batches(requests), RowSums(len(requests)))
        losses, missed = (tally.sums[name].sum.tolist() for name in ("loss", "missed"))
        return [Likelihood(-loss, (), not wrong) for loss, wrong in zip(losses, missed, strict=True)]

    def _batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """This rank's share, as many batches of one length as every rank gets; what is missing are rows of no weight."""
        ranks, rows = self.engine.mesh.data, self.engine.config.train.micro_batch or ROWS
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n].context) - len(requests[n].continuation))
        for start in range(0, len(order), rows * ranks.size):
            chosen = order[start : start + rows * ranks.size]
            state, targets, scored = self.inputs([requests[number] for number in chosen])
            wanted = torch.arange(ranks.rank * rows, (ranks.rank + 1) * rows, device=self.device)
            mine, kept = wanted.clamp(max=len(chosen) - 1), wanted < len(chosen)
            numbers = torch.tensor(chosen, device=self.device)[mine]
            batch = {name: tensor[mine] for name, tensor in state.items()}
            yield batch | {"targets": targets[mine], "weights": (scored[mine] & kept[:, None]).float(), "row": numbers, "sample": numbers}


class RowSums:
    """An objective that adds up, for each request by itself, the losses of its tokens and how many of these are not the likeliest."""

    needs = Needs()

    def __init__(self, count: int) -> None:
        self.count = count

    def prepare(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> Batch:
        raise TypeError("requests are scored, not learned from")

    def inputs(self, batch: Batch) -> State:
        return {name: tensor for name, tensor in batch.items() if name not in ("targets", "weights", "row", "sample")}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        scored = self._spread(batch["row"], batch["weights"].sum(1))
        return {"loss": scored, "missed": scored}

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        """Vectors over all requests."""
        if model.head is None:  # a stage before the last
            return []
        rows = [slice(row, row + 1) for row in range(len(batch["row"]))]
        sums = [_row(model, state["hidden"][row], batch["targets"][row], batch["weights"][row]) for row in rows]
        both = (torch.stack(values) for values in zip(*sums, strict=True))
        return [Term(name, self._spread(batch["row"], values)) for name, values in zip(("loss", "missed"), both, strict=True)]

    def _spread(self, rows: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(self.count, dtype=torch.float64, device=rows.device).index_add_(0, rows, values.double())


def _row(model: Model, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of one row [1, S]: the sum of its losses, and how many of its scored tokens are not the likeliest."""
    loss = model.head.output.loss_sum(hidden, targets, weights)
    if hidden.shape[1] == targets.shape[1]:  # else tensor ranks share the sequence, and the head joins it
        scored = weights[0] > 0
        hidden, targets, weights = hidden[:, scored], targets[:, scored], weights[:, scored]
    return loss, ((model.head.output(hidden).argmax(-1) != targets) * weights).sum()
