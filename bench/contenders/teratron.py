"""This project: its sampler, its batches as the Trainer makes them, its step; bf16 = bfloat16 weights with float32 masters."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import torch
from job import CHECKS, Gate, Job
from safetensors.torch import load_file
from workloads import OPTIM, SEED, model_of

from teratron.config import Config
from teratron.data.batch import make_batch
from teratron.data.indexed import IndexedDataset
from teratron.data.samples import NativeSamples
from teratron.models import load_parts, parameter_count
from teratron.parallel.mesh import Mesh
from teratron.train.device import keep_freed_memory
from teratron.train.engine import Engine
from teratron.train.float32 import choose_float32_products


def train(job: Job, gate: Gate) -> None:
    keep_freed_memory()
    choose_float32_products()
    folder, size = Path(job.folder), job.batch
    device, dataset, checks = torch.device(job.device), IndexedDataset(folder / "tokens"), np.load(folder / "checks.npy")
    samples = NativeSamples(dataset, 0, dataset.total_tokens, job.shape.seq_length, SEED)
    engine = build(job, device)
    gate.ready(parameter_count(engine.model))
    for step in count():
        numbers = np.arange(step * size, (step + 1) * size)
        rows = checks[step] if step < CHECKS else samples.rows(numbers)
        batch = make_batch(rows, numbers, eod=None, isolate_documents=False, mask_end_of_document=False)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        tally, _ = engine.step(batch, step=step + 1, number=step + 1, lr=job.lr)
        gate.passed(tally.loss())


def build(job: Job, device: torch.device) -> Engine:
    keys = {"train.global_batch": job.batch, "train.precision": job.precision, "train.seed": SEED}
    engine = Engine(Config(model=model_of(job.shape), optim=OPTIM).override(keys), Mesh(), device)
    load_parts(engine.model, load_file(Path(job.folder) / "parts.safetensors"))
    for bucket in engine.flat.buckets:
        bucket.master.copy_(bucket.shard)
    return engine
