"""Steps of a config on generated tokens, without a run: to be timed, and to be traced."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from teratron.config import Config
from teratron.data.special import SpecialTokens
from teratron.models import build_model, flops_per_token, parameter_count
from teratron.parallel.device import DTYPES, choose_device
from teratron.parallel.mesh import Mesh, check_layout, mesh_sizes
from teratron.parallel.spans import DATA, STEP, span
from teratron.parallel.worker import connect, disconnect, telling, this_worker
from teratron.plan.layout import assumed_vocabulary
from teratron.train.breakdown import KINDS
from teratron.train.budget import within_budget
from teratron.train.device import check_memory, keep_freed_memory, measure_peak, set_deterministic, synchronize
from teratron.train.engine import Engine, check_batch
from teratron.train.float32 import choose_float32_products
from teratron.train.profiling import traced
from teratron.train.timing import memory_in_use

LR = 1e-6
"""So low that numbers stay numbers on whatever is generated."""


@dataclass(frozen=True)
class Speed:
    """How fast steps are."""

    seconds: float
    """Of a step, the median."""
    tokens: int
    """Of a step's global batch."""
    mfu: float
    """Floating-point operations that the model needs, over those that the measured matrix product would have made meanwhile."""
    memory: float
    """Bytes at the peak on the fullest rank: of CUDA tensors, or of the whole process on CPU."""
    parameters: int
    peak_flops: float
    """Of that product on one rank, a second."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class GeneratedSamples:
    """Uniformly random tokens, other ones for each index."""

    seq_length: int
    vocab_size: int
    count: int | None = None

    def rows(self, index: np.ndarray) -> np.ndarray:
        """int64 [len(index), seq_length + 1]"""
        return np.stack([np.random.default_rng(int(number)).integers(self.vocab_size, size=self.seq_length + 1) for number in index])


class Trial:
    """An engine of this process's rank with initial weights. Raises `UserError` for what a run would refuse."""

    def __init__(self, config: Config, device: str = "auto") -> None:
        worker = this_worker()
        self.config = config.override({"model.vocab_size": config.model.vocab_size or assumed_vocabulary(config)})
        sizes = mesh_sizes(config.parallel, worker.world if worker else 1, config.model)
        self.device = choose_device(device, worker)
        if worker is not None:
            connect(worker, self.device)
        self.mesh = Mesh(sizes, worker.rank if worker else 0, telling())
        check_layout(self.config.model, config.parallel, self.mesh.world)
        check_batch(self.config, self.mesh.data.size)
        check_memory(self.config, self.mesh, self.device)
        set_deterministic(config.train.deterministic)
        keep_freed_memory()
        choose_float32_products()
        self.engine = Engine(within_budget(self.config, self.mesh.world)[0], self.mesh, self.device)
        self.engine.optimizer.initialise(config.train.seed)
        needs = self.engine.objective.needs
        vocabulary = self.config.model.vocab_size
        self._samples = GeneratedSamples(needs.length or config.model.seq_length, vocabulary)
        self._special = SpecialTokens(vocabulary, 0, dict.fromkeys(needs.roles, 0))
        self._done = 0

    def close(self) -> None:
        if self.mesh.world > 1:
            disconnect()

    def step(self) -> None:
        """One step, to its end on the device."""
        self._done += 1
        size = self.config.largest_batch
        with span(STEP):
            with span(DATA):
                index = np.arange((self._done - 1) * size, self._done * size)[self.engine.rows(size)]
                batch = self.engine.objective.prepare(self._samples, index, self._special)
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            _, norm = self.engine.step(batch, step=self._done, number=self._done, lr=LR)
            float(norm)
            synchronize(self.device)

    def speed(self, steps: int) -> Speed:
        """Time so many steps after some to warm up; a collective."""
        for _ in range(3 if self.device.type == "cuda" or self.config.train.compile else 1):
            self.step()
        seconds = statistics.median(self._timed() for _ in range(steps))
        whole = build_model(self.config.model, device="meta")
        tokens = self.config.largest_batch * self.config.model.seq_length
        needed = tokens * flops_per_token(whole, self.config.model.seq_length, self.engine.objective.needs.predicted)
        peak, memory = self._all(measure_peak(self.device, DTYPES[self.config.train.precision]), memory_in_use(self.device)[1])
        mfu = needed / seconds / sum(peak)
        return Speed(seconds, tokens, mfu, max(memory), parameter_count(whole), sum(peak) / len(peak))

    def _timed(self) -> float:
        """The slowest rank's seconds of a step."""
        self._all(0.0)
        start = time.perf_counter()
        self.step()
        return max(self._all(time.perf_counter() - start)[0])

    def breakdown(self, steps: int, folder: Path | None) -> list[dict[str, float]]:
        """Every rank's milliseconds of a mean step by kind of work, from a trace of so many; a collective. folder: to keep traces in."""
        with tempfile.TemporaryDirectory() as passing, traced(folder or Path(passing), self.mesh.rank) as found:
            for _ in range(steps):
                self._all(0.0)
                self.step()
        columns = self._all(*found["kinds"].values())
        return [dict(zip(KINDS, row, strict=True)) for row in zip(*columns, strict=True)]

    def _all(self, *values: float) -> list[list[float]]:
        """For each value that of every rank, in rank order."""
        mine = torch.tensor(values, dtype=torch.float64)
        rows = mine.new_empty(self.mesh.world, len(mine))
        self.mesh.control.gather(rows, mine).wait()
        return rows.t().tolist()


def best_seconds(action: Callable[[], None], device: torch.device, times: int = 5) -> float:
    """The least time of several, the first left out."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        action()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
