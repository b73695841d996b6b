"""Lightning's Trainer around the nanoGPT-style model: its loop, clipping and precision plugin, progress bar and logger off."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from job import Gate, Job
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from contenders import nanogpt
from contenders.plain import adamw, count, cross_entropy


def train(job: Job, gate: Gate) -> None:
    module = Module(job, gate)
    trainer = lightning.Trainer(
        accelerator=job.device, devices=1, precision="bf16-mixed" if job.precision == "bf16" else "32-true", max_steps=-1,
        gradient_clip_val=job.clip, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=job.folder,
    )  # fmt: skip
    gate.ready(count(module))
    trainer.fit(module, DataLoader(Windows(job), batch_size=None))


class Windows(IterableDataset):
    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Any:
        return self.job.batches()


class Module(lightning.LightningModule):
    def __init__(self, job: Job, gate: Gate) -> None:
        super().__init__()
        self.job, self.gate, self.model = job, gate, nanogpt.build(job)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.gate.passed(outputs["loss"].detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.job, self.model)
