"""What a run tells: one JSON line an event, TensorBoard, and a live line on the terminal."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

from teratron.config import UserError
from teratron.train.scalars import SCALARS
from teratron.train.sinks import Sink
from teratron.train.tensorboard import TensorBoard, available


class Metrics:
    """Appends events to RUN/metrics.jsonl (each line at once), and to RUN/tensorboard when asked and installed.

    Raises `UserError` when they cannot be written.
    """

    def __init__(self, run: Path, tensorboard: bool, say: Callable[[str], None] = print, sinks: Sequence[Sink] = ()) -> None:
        """say: takes the one line that tells of a missing tensorboard package. sinks: other services that get the curves, too."""
        self._run, self._sinks = run, sinks
        with self._reporting():
            self._file = (run / "metrics.jsonl").open("ab+", buffering=0)
            _end_last_line(self._file)
        self._folder = run / "tensorboard" if tensorboard and available() else None
        if tensorboard and self._folder is None:
            say("log.tensorboard = true, but the package is not installed, so no curves are written for it: pip install tensorboard")
        self._board: TensorBoard | None = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()
        if self._board is not None:
            # What ended training matters more than the last scalars, which metrics.jsonl holds anyway.
            with contextlib.suppress(OSError) if error is not None else self._reporting():
                self._board.close()

    def write(self, event: str, **values: Any) -> None:
        """One event; numbers that are not finite become null."""
        record = {"event": event, **values}
        line = json.dumps(_finite(record)).encode() + b"\n"
        with self._reporting():
            if self._file.write(line) != len(line):  # unbuffered: a full disk may take a part without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._folder is not None and event in SCALARS:
                self._board = self._board or TensorBoard(self._folder)  # its import takes a second: not before the first step
                self._board.write(record)
        for sink in self._sinks:
            sink.write(record)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._run}: the run's metrics cannot be written: {error.strerror or error}; "
                "earlier checkpoints are intact; free space, then run the same command again"
            ) from None


class Silence:
    """The metrics of the ranks that do not write any."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, event: str, **values: Any) -> None:
        pass


def _finite(value: Any) -> Any:
    """The value with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_last_line(file: IO[bytes]) -> None:
    """A killed process may leave half a line: end it, so that the next event stands alone."""
    if file.seek(0, 2):
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")


class Console:
    """The live line: redrawn in place on a terminal, a plain line every `every` steps elsewhere; without a stream, silence."""

    def __init__(self, total: int, every: int, stream: TextIO | None) -> None:
        self.total, self.every = total, every
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._drawn = -math.inf
        self._width = 0
        self._steps, self._mean_seconds = 0, 0.0

    def step(self, event: dict[str, Any]) -> None:
        """Show a step event, with the time left."""
        step, last = event["step"], event["step"] == self.total
        left = self._mean(event["seconds"]) * (self.total - step)
        if not self._live and step % self.every and step != 1 and not last:
            return
        if self._live and time.monotonic() - self._drawn < 0.1 and not last:
            return
        self._drawn = time.monotonic()
        self._draw(
            f"step {step:>{len(str(self.total))}}/{self.total}  loss {event['loss']:.4f}",
            f"{event['tokens_per_second']:,.0f} tokens/s",
            f"MFU {event['mfu']:.0%}",
            f"left {duration(left)}",
            f"lr {event['lr']:.2e}",
            f"norm {event['grad_norm']:.2f}",
        )

    def _mean(self, seconds: float) -> float:
        """The moving mean of a step's seconds; the first step, which also warms up, counts only until there is another."""
        self._steps += 1
        self._mean_seconds = seconds if self._steps <= 2 else 0.95 * self._mean_seconds + 0.05 * seconds
        return self._mean_seconds

    def say(self, text: str) -> None:
        """A line that stays."""
        cleared = "\r" + " " * self._width + "\r" if self._width else ""
        self._width = 0
        self._write(f"{cleared}{text}\n")

    def finish(self) -> None:
        """Leave the live line standing."""
        if self._width:
            self._write("\n")
            self._width = 0

    def _draw(self, *parts: str) -> None:
        """Write the line; on a terminal without the last parts, as far as it is narrow: a line that wraps cannot be redrawn."""
        if not self._live:
            self._write("  ".join(parts) + "\n")
            return
        width = shutil.get_terminal_size().columns - 1
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts = parts[:-1]
        text = "  ".join(parts)[:width]
        self._write("\r" + text.ljust(self._width))
        self._width = len(text)

    def _write(self, text: str) -> None:
        try:
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except OSError:  # nobody reads any more, or the disk is full: training goes on in silence, metrics.jsonl has it all
            self._stream = None


def duration(seconds: float) -> str:
    """Such as 42 s, 3:07 or 2:15:00."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
