"""Fine-tuning: a pretrained model learns a task from examples, one file a task; see docs/tasks.md."""

from __future__ import annotations

from teratron.tasks.finetune.answer import Answer
from teratron.tasks.finetune.chat import Chat
from teratron.tasks.finetune.choose import Choose
from teratron.tasks.finetune.classify import Classify
from teratron.tasks.finetune.embed import Embed
from teratron.tasks.finetune.prefer import Prefer
from teratron.tasks.finetune.seq2seq import Seq2Seq
from teratron.tasks.finetune.tag import Tag
from teratron.tasks.finetune.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Tag, Answer, Choose, Seq2Seq, Chat, Prefer, Embed)}
