"""Whether probabilities mean what they say."""

from __future__ import annotations

import numpy as np


def calibration_error(confidences: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): mean gap of confidence and accuracy over equal bins of confidence, (0, 1/bins] first.

    confidences, correct: probability of the chosen label, and whether it is right, [N].
    """
    inside = np.clip(np.ceil(np.asarray(confidences, np.float64) * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(inside, weights=np.asarray(correct, np.float64) - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(inside))


def brier(probabilities_NC: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Squared distance (Brier 1950) of each example's probabilities from the label's, summed over the classes, [N]: 0 to 2."""
    return ((probabilities_NC - np.eye(probabilities_NC.shape[1])[gold]) ** 2).sum(axis=1)
