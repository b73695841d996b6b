"""What a run tells: one JSON line an event, TensorBoard, and a live line on the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from teratron.train.tensorboard import TensorBoard, available


class Metrics:
    """Appends events to RUN/metrics.jsonl (each line flushed), and to RUN/tensorboard when asked and installed."""

    def __init__(self, run: Path, tensorboard: bool) -> None:
        path = run / "metrics.jsonl"
        _end_last_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._folder = run / "tensorboard" if tensorboard and available() else None
        self._board: TensorBoard | None = None

    def write(self, event: str, **values: Any) -> None:
        """One event; numbers that are not finite become null."""
        record = {"event": event, **values}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._folder is not None and event in ("step", "eval"):
            self._board = self._board or TensorBoard(self._folder)  # its import takes a second: not before the first step
            self._board.write(record)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _end_last_line(path: Path) -> None:
    """A killed process may leave half a line: end it, so that the next event stands alone."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


class Console:
    """The live line: redrawn in place on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, total: int, every: int, stream: TextIO | None = None) -> None:
        self.total, self.every = total, every
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._drawn = 0.0
        self._width = 0

    def step(self, event: dict[str, Any], seconds_left: float) -> None:
        """Show a step event."""
        step, last = event["step"], event["step"] == self.total
        if not self.live and step % self.every and step != 1 and not last:
            return
        if self.live and time.monotonic() - self._drawn < 0.1 and not last:
            return
        self._drawn = time.monotonic()
        text = (
            f"step {step:>{len(str(self.total))}}/{self.total}  loss {event['loss']:.4f}  lr {event['lr']:.2e}  "
            f"norm {event['grad_norm']:.2f}  {event['tokens_per_second']:,.0f} tokens/s  MFU {event['mfu']:.0%}  left {duration(seconds_left)}"
        )
        self._draw(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
        self._width = 0
        self.stream.write(text + "\n")
        self.stream.flush()

    def _draw(self, text: str) -> None:
        if not self.live:
            self.stream.write(text + "\n")
        else:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        self.stream.flush()

    def finish(self) -> None:
        """Leave the live line standing."""
        if self.live and self._width:
            self.stream.write("\n")
            self._width = 0


def duration(seconds: float) -> str:
    """Such as 42 s, 3:07 or 2:15:00."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
