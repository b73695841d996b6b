"""The run's events as TensorBoard scalars."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teratron.config import UserError
from teratron.train.scalars import scalars


def available() -> bool:
    """Whether the tensorboard package is installed, found out without importing it."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoard:
    """Writes events into a folder for `tensorboard --logdir`.

    The first step written hides all that an earlier process wrote for this step and later ones: they are trained again.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError when the tensorboard package is missing."""
        if not available():
            raise UserError(
                "log.tensorboard = true, but the tensorboard package is not installed: "
                "pip install tensorboard, or turn it off with --log.tensorboard false"
            )
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def write(self, event: Mapping[str, Any]) -> None:
        """Write an event's numbers at its step and time; kinds without scalars and missing numbers are passed over."""
        values = scalars(event)
        if values and self._writer is None:
            retrained = event["step"] if event["event"] == "step" else None
            self._writer = self._open(str(self._folder), purge_step=retrained, flush_secs=10)
        for tag, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(tag, value, event["step"], event.get("time"))

    def close(self) -> None:
        """Flush everything to disk; a later write opens a new file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
