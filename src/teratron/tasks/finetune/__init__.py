"""Fine-tuning: a pretrained model learns a task from examples, one file a task; see docs/tasks.md."""

from __future__ import annotations

from teratron.tasks.finetune.classify import Classify
from teratron.tasks.finetune.tag import Tag
from teratron.tasks.finetune.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Tag)}
