"""Where the time and the memory of steps go, on every rank: the step's own work, waiting for data, waiting for other ranks; who is slow."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.optim import Optimizer
from teratron.parallel.buckets import Bucket
from teratron.parallel.mesh import AXES, Mesh

SLOW = 1.5
"""Times the median of its stage's ranks that a rank's own work takes before it is a straggler."""
PERSISTENT = 5
"""Reports in a row that name the same rank before the console does."""
MEMORY = ("weights", "gradients", "optimizer")
COLUMNS = ("seconds", "data", "communication", "now", "peak", *MEMORY)
"""What each rank brings to a report: seconds of a mean step, and bytes."""


@dataclass
class Lap:
    """One step's seconds, which are known once it has ended."""

    seconds: float = 0.0
    data: float = 0.0
    """Waiting for the batch."""
    communication: float = 0.0
    """Waiting for other ranks, on the host."""
    _begun: float = field(default_factory=time.perf_counter)

    def got_data(self) -> None:
        """The batch is here, which the lap began by asking for."""
        self.data = time.perf_counter() - self._begun

    def end(self, communication: float) -> None:
        self.seconds, self.communication = time.perf_counter() - self._begun, communication

    @property
    def own(self) -> float:
        """What this rank did itself."""
        return self.seconds - self.communication


class Watch:
    """Times every step; a report gathers what all ranks have seen since the last one, in one small collective.

    On CPU a rank's own work is the step without the waits for others. On a CUDA device the host does not wait where the device does:
    there `communication` is what the host saw of it, and a straggler's neighbours look as slow as itself.
    """

    def __init__(self, mesh: Mesh, optimizer: Optimizer, device: torch.device, say: Callable[[str], None]) -> None:
        self.mesh, self.device, self._say = mesh, device, say
        self._optimizer = optimizer
        self._laps: list[Lap] = []
        self._in_a_row: dict[int, int] = {}

    @contextmanager
    def step(self) -> Iterator[Lap]:
        """Time what is done within."""
        waited, lap = self.mesh.doing.waited, Lap()
        yield lap
        lap.end(self.mesh.doing.waited - waited)
        self._laps.append(lap)

    def report(self) -> dict[str, Any]:
        """A collective: what the ranks saw since the last one, as the event `ranks`."""
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self._gathered(self._row())]
        self._laps.clear()
        own = [row["seconds"] for row in rows]
        slow = stragglers(own, self._stage_of)
        self._name(slow, own)
        event: dict[str, Any] = {"seconds": [_short(value) for value in own]}
        event |= {"stragglers": [{"rank": rank, "times": _short(times)} for rank, times in slow.items()]}
        event |= {name: max(row[name] for row in rows) for name in ("data", "communication")}
        fullest = max(range(len(rows)), key=lambda rank: rows[rank]["peak"])
        memory = {name: int(rows[fullest][name]) for name in COLUMNS[3:]}
        memory["rest"] = max(0, memory["now"] - sum(memory[name] for name in MEMORY))
        return event | {"memory": {"rank": fullest, **memory}}

    def _row(self) -> list[float]:
        count = max(1, len(self._laps))
        times = [sum(getattr(lap, name) for lap in self._laps) / count for name in ("own", "data", "communication")]
        return [*times, *memory_in_use(self.device), *self._state_bytes]

    @cached_property
    def _state_bytes(self) -> tuple[int, int, int]:
        """The same between any two steps."""
        return state_bytes(self._optimizer)

    def _gathered(self, row: list[float]) -> list[list[float]]:
        """Every rank's row."""
        mine = torch.tensor(row, dtype=torch.float64)
        rows = mine.new_empty(self.mesh.world, len(row))
        self.mesh.control.gather(rows, mine).wait()
        return rows.tolist()

    def _stage_of(self, rank: int) -> int:
        """Ranks of different pipeline stages have different work."""
        return rank // (self.mesh.world // self.mesh.sizes[AXES[0]])

    def _name(self, slow: dict[int, float], own: list[float]) -> None:
        """Tell of ranks that stay slow, once."""
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in slow}
        for rank, times in slow.items():
            if self._in_a_row[rank] == PERSISTENT:
                self._say(f"rank {rank} is slow: its own work takes {own[rank]:.3g} s a step, {times:.1f} times as long as its peers'")


def stragglers(own: list[float], stage_of: Callable[[int], int]) -> dict[int, float]:
    """Ranks whose own work takes over `SLOW` times the median of the same stage's ranks, and how many times; of two the faster counts."""
    stages: dict[int, list[float]] = {}
    for rank, seconds in enumerate(own):
        stages.setdefault(stage_of(rank), []).append(seconds)
    usual = {stage: statistics.median_low(values) for stage, values in stages.items()}
    times = {rank: seconds / usual[stage_of(rank)] for rank, seconds in enumerate(own) if usual[stage_of(rank)] > 0}
    return {rank: many for rank, many in times.items() if many > SLOW}


def memory_in_use(device: torch.device) -> tuple[float, float]:
    """Bytes now and at most so far: of CUDA tensors, or of the whole process on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return peak, peak
    now = pages * resource.getpagesize()
    return now, max(now, peak)


def state_bytes(optimizer: Optimizer) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state that this rank holds now."""
    buckets = optimizer.flat.buckets
    weights = _bytes(tensor for bucket in buckets for tensor in (bucket.weights, bucket.shard))
    gradients = _bytes(tensor for bucket in buckets if bucket.trained for tensor in _gradients(bucket))
    masters = _bytes(bucket.master for bucket in buckets if bucket.master is not bucket.shard)
    return weights, gradients, masters + _bytes(flat for flats in optimizer.state.values() for flat in flats)


def _short(value: float) -> float:
    """Four digits: metrics.jsonl has a number a rank."""
    return float(f"{value:.4g}")


def _gradients(bucket: Bucket) -> tuple[Tensor, ...]:
    return bucket.backward, bucket.gradient, *((bucket.total,) if bucket.sharding.keep_gradients else ())


def _bytes(tensors: Iterator[Tensor]) -> int:
    """Of their memory; what several are views of counts once."""
    storages = {storage._cdata: storage.nbytes() for tensor in tensors for storage in (tensor.untyped_storage(),)}
    return sum(storages.values())
