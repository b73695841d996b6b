"""Runs of `teratron finetune` used from Python: vectors of texts, texts for texts, replies in conversations; device: auto, cpu or cuda."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from teratron.config import Config, UserError
from teratron.models import Model
from teratron.parallel.device import choose_device
from teratron.tasks.finetune.chat import Chat
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.conversations import messages_of
from teratron.tasks.finetune.embed import Embed, vectors
from teratron.tasks.finetune.judge import best_model
from teratron.tasks.finetune.prepare import load_task, run_tokenizer
from teratron.tasks.finetune.seq2seq import Seq2Seq
from teratron.tasks.finetune.task import Task

Kind = TypeVar("Kind", bound=Task)


def embed(run: str | Path, texts: Sequence[str], *, device: str = "auto") -> np.ndarray:
    """Unit vectors of texts by a run of embed, float32 [N, hidden]; their products are cosines. Raises `UserError` for another run."""
    _, model, config, coder = _opened(Path(run), Embed, device)
    return vectors(model, config, texts, coder)


def write(run: str | Path, texts: Sequence[str], *, device: str = "auto") -> list[str]:
    """What a run of seq2seq writes for texts, such as their translations. Raises `UserError` for another run."""
    task, model, config, coder = _opened(Path(run), Seq2Seq, device)
    return list(task.predict(model, config, [{"source": text} for text in texts], coder))


def reply(run: str | Path, messages: Sequence[dict[str, Any]], *, device: str = "auto") -> str:
    """What a run of chat says next in a conversation of role and content. Raises `UserError` for another run, or no conversation."""
    task, model, config, coder = _opened(Path(run), Chat, device)
    asked = messages_of([*messages, {"role": "assistant", "content": ""}], "the conversation")[:-1]
    return task.replies(model, config, [asked], coder)[0]


def _opened(run: Path, kind: type[Kind], device: str) -> tuple[Kind, Model, Config, Coder]:
    """A run's task and its best model."""
    task = load_task(run)
    if not isinstance(task, kind):
        raise UserError(f"{run}: a run of the task {task.name}, expected one of {kind.name}")
    model, config, _ = best_model(run, choose_device(device))
    return task, model, config, Coder(run_tokenizer(run), config.model, task.options.length)
