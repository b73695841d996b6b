"""`transformers.Trainer` with its own defaults: fused AdamW, its data loader, its clipping, its loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from job import Gate, Job
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from contenders.hf import build
from contenders.plain import count


def train(job: Job, gate: Gate) -> None:
    model = build(job)
    arguments = TrainingArguments(
        output_dir=job.folder, max_steps=10**9, per_device_train_batch_size=job.batch, lr_scheduler_type="constant",
        learning_rate=job.lr, adam_beta1=job.betas[0], adam_beta2=job.betas[1], adam_epsilon=job.eps,
        weight_decay=job.weight_decay, max_grad_norm=job.clip, bf16=job.precision == "bf16", use_cpu=job.device == "cpu",
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Watched(model, arguments, train_dataset=Windows(job))
    trainer.add_callback(Steps(trainer, gate))
    gate.ready(count(model))
    trainer.train()


class Windows(IterableDataset):
    """The job's rows as Trainer wants them; `shift_labels` are targets that its models must not shift once more."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row in self.job.rows():
            yield {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}


class Watched(Trainer):
    loss: Tensor

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class Steps(TrainerCallback):
    def __init__(self, trainer: Watched, gate: Gate) -> None:
        self.trainer, self.gate = trainer, gate

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.gate.passed(self.trainer.loss)
