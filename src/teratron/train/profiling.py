"""A trace of one step on demand, by PyTorch's profiler, with tables of where its time goes and of the dearest operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from teratron.config import UserError
from teratron.parallel.spans import STEP, span
from teratron.train.breakdown import KINDS, breakdown
from teratron.train.metrics import Metrics, Silence

DEAREST = 10
REQUEST = "profile-now"
"""A file of this name in the run folder asks for a trace; it is removed."""


class Tracer:
    """Traces the steps that `log.profile_step` or a file RUN/profile-now asks for, on every rank."""

    def __init__(self, run: Path, step: int, rank: int, metrics: Metrics | Silence, say: Callable[[str], None]) -> None:
        """step: to be traced; 0 = none yet."""
        self.run, self.step, self.rank = run, step, rank
        self._metrics, self._say = metrics, say
        self._looked = 0.0

    def asked(self) -> bool:
        """Whether somebody has made the file since the last time; rank 0 looks for it, once a second."""
        if self.rank or time.monotonic() < self._looked + 1:
            return False
        self._looked = time.monotonic()
        try:
            (self.run / REQUEST).unlink()
        except OSError:
            return False
        return True

    @contextmanager
    def tracing(self, step: int) -> Iterator[None]:
        """What is done within is that step."""
        if step != self.step:
            yield
            return
        folder = self.run / "profile" / f"step-{step:08d}"
        with traced(folder, self.rank) as found, span(STEP):
            yield
        self._metrics.write("profile", step=step, folder=str(folder.relative_to(self.run)), **found, time=time.time())
        self._say(f"step {step}: traced into {folder}\n{table(found)}")


@contextmanager
def traced(folder: Path, rank: int) -> Iterator[dict[str, Any]]:
    """Trace what is done within, steps among it, into FOLDER/rank-R.json, beside rank-R.txt; what is yielded is filled at the end.

    The trace is for chrome://tracing or Perfetto. Raises `UserError` when the files cannot be written.
    """
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, Any] = {}
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        yield found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{rank}.json"))
        found |= {"kinds": breakdown(folder / f"rank-{rank}.json"), "operations": dearest(profiler, bool(cuda))}
        (folder / f"rank-{rank}.txt").write_text(table(found), "utf-8")
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}: the trace cannot be written: {error}; free space, then run the same command") from None


def dearest(profiler: Any, cuda: bool) -> list[dict[str, Any]]:
    """The operations with the most time of their own (on the device where there is one): name, calls, milliseconds, share."""
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = [(entry, getattr(entry, key) / 1000) for entry in profiler.key_averages()]
    total = sum(time for _, time in times) or 1.0
    times = sorted(times, key=lambda found: -found[1])[:DEAREST]
    return [{"name": entry.key, "calls": entry.count, "ms": round(time, 3), "share": round(time / total, 4)} for entry, time in times]


def table(found: dict[str, Any]) -> str:
    """A line for each kind of work that takes time, and one for each of the dearest operations."""
    kinds, step = found["kinds"], sum(found["kinds"].values())
    lines = [f"{'ms':>10}  {'share':>6}  kind of work"]
    lines += [f"{time:>10.3f}  {time / step:>6.1%}  {KINDS[kind]}" for kind, time in kinds.items() if time]
    lines += ["", f"{'ms':>10}  {'share':>6}  {'calls':>6}  operation"]
    lines += [f"{entry['ms']:>10.3f}  {entry['share']:>6.1%}  {entry['calls']:>6}  {entry['name']}" for entry in found["operations"]]
    return "\n".join(lines)
