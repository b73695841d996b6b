"""Confidence intervals by bootstrap: how a metric would vary with another draw of as many examples (Efron 1979)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from teratron.models.random import seed_of

RESAMPLES, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Metric:
    """A number over examples."""

    name: str
    of: Callable[[np.ndarray], float]
    """The metric of the examples with these numbers, int64 [N]; one may come several times."""

    @classmethod
    def mean(cls, name: str, values: object) -> Metric:
        """The mean of a value for each example, [N]."""
        held = np.asarray(values, np.float64)
        return cls(name, lambda chosen: float(held[chosen].mean()))


@dataclass(frozen=True)
class Estimate:
    """A metric's value, and between which two values it lies in 95 of 100 draws; without examples enough all three may be NaN."""

    value: float
    low: float
    high: float


def estimate(metric: Metric, count: int, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A metric over `count` examples with its percentile interval. The draws follow from the seed and the count alone, so that two
    metrics, or two models, are compared on the same ones. Raises ValueError without examples.
    """
    if count < 1:
        raise ValueError("a metric needs at least one example")
    draw = np.random.default_rng(seed_of("bootstrap", seed, count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw of all the same example has no deviation: its correlation is NaN
        values = np.array([metric.of(draw.integers(count, size=count)) for _ in range(resamples)])
        known = values[~np.isnan(values)]
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if known.size else (np.nan, np.nan)
        return Estimate(metric.of(np.arange(count)), float(low), float(high))
