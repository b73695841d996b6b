"""The nanoGPT-style model in `DistributedDataParallel` on one rank."""

from __future__ import annotations

from job import Gate, Job
from torch.nn.parallel import DistributedDataParallel

from contenders import nanogpt
from contenders.plain import alone, loop


def train(job: Job, gate: Gate) -> None:
    alone(job)
    model = DistributedDataParallel(nanogpt.build(job))
    loop(job, gate, model, model)
