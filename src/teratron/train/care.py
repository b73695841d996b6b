"""What a launcher has to know of a run to start it again: whether it got on, and how many processes it can have."""

from __future__ import annotations

from pathlib import Path

import torch

from teratron.checkpoint.memory import memory_folder
from teratron.checkpoint.reader import candidates
from teratron.config import Config, UserError
from teratron.parallel.restart import Care
from teratron.train.engine import check_degrees


def care_of(config: Config, run: Path, device: str, *, restarts: int, min_nproc: int, hang_timeout: float) -> Care:
    """The care for a run on `device` (auto, cpu or cuda)."""

    def allows(nproc: int) -> bool:
        try:
            check_degrees(config, nproc)
        except UserError:
            return False
        return True

    def devices() -> int:
        return 0 if device == "cpu" else torch.cuda.device_count()

    return Care(restarts, min_nproc, hang_timeout, lambda: newest_step(run), allows, devices)


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint on disk or in memory, good or not; 0 without one."""
    folders = [folder for place in (run, memory_folder(run)) if place is not None for folder in candidates(place)]
    return max((step for step, _ in folders), default=0)
