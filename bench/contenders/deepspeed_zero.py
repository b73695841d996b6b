"""DeepSpeed ZeRO-1 around the nanoGPT-style model on one rank: its bf16 weights with float32 masters, its clipping, fused AdamW."""

from __future__ import annotations

import os

os.environ["LOCAL_RANK"] = "0"  # its launcher would set it

import deepspeed
from job import Gate, Job

from contenders import nanogpt
from contenders.plain import adamw, alone, count, cross_entropy


def train(job: Job, gate: Gate) -> None:
    alone(job)
    model = nanogpt.build(job)
    settings = {
        "train_batch_size": job.batch,
        "train_micro_batch_size_per_gpu": job.batch,
        "gradient_clipping": job.clip,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": job.precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(job, model), config=settings)
    gate.ready(count(model))
    for x, y in job.batches():
        loss = cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()
        gate.passed(loss.detach())
