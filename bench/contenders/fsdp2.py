"""The nanoGPT-style model cut by `fully_shard` (FSDP2), a block a unit, on one rank; bf16 by its mixed-precision policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from job import Gate, Job
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from contenders import nanogpt
from contenders.plain import alone, loop


def train(job: Job, gate: Gate) -> None:
    alone(job)
    model: Any = nanogpt.build(job)
    mesh = init_device_mesh(job.device, (1,))
    half = job.precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    blocks = model.model.layers if job.shape.llama else model.transformer.h
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    loop(replace(job, precision="fp32"), gate, model, model)
