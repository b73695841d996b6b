"""The gradient noise scale: how large a batch may be before more of it helps little (McCandlish et al. 2018, appendix A.1).

It compares the gradient's norm over a step's batch with that over a part of it, which one more pass computes. Which samples those are
depends on the step alone, so all layouts measure the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from teratron.config import Config, UserError
from teratron.objectives import Batch
from teratron.optim import global_norm
from teratron.train.engine import Engine

KEPT = 0.9
"""Of the smoothed values at every measurement: a single one is a noisy difference of two large numbers."""


@dataclass(frozen=True)
class Noise:
    """What one gradient consists of, smoothed over measurements, each of them its share of a squared norm."""

    signal: float
    """The true gradient's squared norm."""
    variance: float
    """Of the gradient of a single sequence, summed over all parameters."""

    @property
    def critical_batch(self) -> float:
        """Sequences of the batch at which signal and noise are equal, the simple noise scale; NaN while there is no signal."""
        return self.variance / self.signal if self.signal > 0 else math.nan

    def told(self, seq_length: int) -> str:
        """Such as `120 sequences (15,360 tokens)`."""
        size = self.critical_batch
        return f"{size:,.4g} sequences ({size * seq_length:,.4g} tokens)" if size > 0 else "unknown yet (no signal above the noise)"

    def smoothed(self, past: Noise | None) -> Noise:
        """Together with the measurements before it; a ratio of two such sums needs no correction for their beginning."""
        if past is None:
            return self
        signal, variance = ((1 - KEPT) * a + KEPT * b for a, b in ((self.signal, past.signal), (self.variance, past.variance)))
        return Noise(signal, variance)


def part_of(batch: int) -> int:
    """Sequences of the part of a global batch that is measured apart."""
    return max(1, batch // 4)


def separate(part: float, whole: float, part_size: int, whole_size: int) -> Noise:
    """Signal and noise from the gradients' squared norms over a part of a batch and over the whole; without bias.

    The expected squared norm over B sequences is signal + variance / B.
    """
    signal = (whole_size * whole - part_size * part) / (whole_size - part_size)
    return Noise(signal, (part - whole) / (1 / part_size - 1 / whole_size))


def probe(engine: Engine, batch: Batch, step: int, loss_scale: float) -> Tensor:
    """The norm of a batch's gradient, from which nothing is learnt; a float64 scalar, the same on every rank."""
    engine.passes(batch, step=step, loss_scale=loss_scale)
    norm = global_norm(engine.flat) / loss_scale
    engine.flat.clear()
    return norm


def check_noise(config: Config, ranks: int) -> None:
    """Raise `UserError` for batches that have no part to compare with, or none that so many data ranks can share."""
    if not config.log.noise_scale:
        return
    for size in config.batches.sizes:
        if size == 1:
            raise UserError(
                f"log.noise_scale = {config.log.noise_scale} compares a batch with a part of it, and the global batch is 1: raise "
                "train.global_batch, or leave log.noise_scale out"
            )
        if config.model.experts and part_of(size) % ranks:
            raise UserError(
                f"log.noise_scale = {config.log.noise_scale} measures {part_of(size)} of {size} sequences apart, which {ranks} data ranks "
                f"cannot share evenly, as experts need: make the batch a multiple of {4 * ranks}, or leave log.noise_scale out"
            )
