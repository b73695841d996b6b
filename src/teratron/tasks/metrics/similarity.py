"""Correlation of two series, as for graded similarity; NaN where one of them is constant or has a single value."""

from __future__ import annotations

import numpy as np


def pearson(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Correlation of the values."""
    x, y = (np.asarray(values, np.float64) for values in (predicted, gold))
    x, y = x - x.mean(), y - y.mean()
    spread = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(x @ y / spread, -1, 1)) if spread else float("nan")


def spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(gold))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]
