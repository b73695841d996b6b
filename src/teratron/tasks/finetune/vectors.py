"""Vectors of texts by a run of `teratron finetune embed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teratron.config import UserError
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.embed import Embed, vectors
from teratron.tasks.finetune.judge import best_model
from teratron.tasks.finetune.prepare import load_task, run_tokenizer


def embed(run: str | Path, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of texts by a run's best checkpoint, float32 [N, hidden]; their products are cosines.

    Raises `UserError` for a folder that is no run of `teratron finetune embed`.
    """
    folder = Path(run)
    task = load_task(folder)
    if not isinstance(task, Embed):
        raise UserError(f"{folder}: a run of the task {task.name}, expected one of embed")
    model, config, _ = best_model(folder)
    return vectors(model, config, texts, Coder(run_tokenizer(folder), config.model, task.options.length))
