"""The process that writes a run's curves to Weights & Biases or MLflow: JSON lines come on standard input until it ends.

Run as a file, so that it loads nothing of ours, and not PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOM = 10_000
"""Events that wait while the service is slow; more are dropped."""
GRACE = 60
"""Seconds after the end of the input in which this process ends, whatever the service does."""

Write = Callable[[dict[str, float], int], None]


def main(service: str, target: str, run: Path) -> None:
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue(ROOM)
    threading.Thread(target=read, args=(lines,), daemon=True).start()
    write, close = {"wandb": open_wandb, "mlflow": open_mlflow}[service](target, run)
    for line in iter(lines.get, None):
        write(line["values"], line["step"])
    close()


def read(lines: queue.Queue[dict[str, Any] | None]) -> None:
    """Take in what comes, at once: the sender must never wait, and the end must be seen while the service hangs."""
    dropped = 0
    for line in sys.stdin.buffer:
        try:
            lines.put_nowait(json.loads(line))
        except queue.Full:
            dropped += 1
    if dropped:
        print(f"{dropped} events were dropped, as the service was slow", file=sys.stderr, flush=True)
    signal.alarm(GRACE)
    lines.put(None)


def open_wandb(project: str, run: Path) -> tuple[Write, Callable[[], None]]:
    """A W&B run of the same name for as long as the folder lives: a restart goes on with it."""
    import wandb

    name = run / ".wandb-run"
    started = wandb.init(project=project, name=run.name, dir=str(run), id=name.read_text() if name.is_file() else None, resume="allow")
    with contextlib.suppress(OSError):
        name.write_text(started.id)
    return lambda values, step: started.log(values, step=step), started.finish


def open_mlflow(experiment: str, run: Path) -> tuple[Write, Callable[[], None]]:
    """An MLflow run of the same name for as long as the folder lives, where MLFLOW_TRACKING_URI says."""
    import mlflow

    mlflow.set_experiment(experiment)
    name = run / ".mlflow-run"
    started = mlflow.start_run(run_id=name.read_text()) if name.is_file() else mlflow.start_run(run_name=run.name)
    with contextlib.suppress(OSError):
        name.write_text(started.info.run_id)
    return lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # Python's own exit would wait for the thread that reads
