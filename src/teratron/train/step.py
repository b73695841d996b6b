"""One optimizer step: micro-batches forward and backward, the token-exact loss, clip, update."""

from __future__ import annotations

from collections.abc import Iterator

from teratron.models import GPT
from teratron.models.random import mask_keys
from teratron.objectives import Batch, Objective, Tally, total_loss
from teratron.optim import AdamW


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch along its first dimension; size 0 = whole."""
    count = batch["sample"].shape[0]
    for start in range(0, count, size or count):
        yield {name: tensor[start : start + (size or count)] for name, tensor in batch.items()}


def train_step(
    model: GPT, objective: Objective, optimizer: AdamW, batch: Batch, *, step: int, seed: int, micro_batch: int, lr: float
) -> tuple[Tally, float]:
    """Learn from one global batch; returns its terms and the gradient norm before clipping.

    The loss is exact over the global batch: its counts are known before the first forward pass (contract C2).
    """
    tally = Tally(counts=objective.counts(batch))
    for part in micro_batches(batch, micro_batch):
        state = model(objective.inputs(part), keys=mask_keys(seed, step, part["sample"], part["positions"], part.get("segments")))
        terms = objective.terms(model, state, part)
        total_loss(terms, tally.counts).backward()
        optimizer.collect()
        tally.add(terms)
    return tally, optimizer.step(step, lr)
