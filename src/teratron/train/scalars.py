"""The numbers of a run's events as curves: their names in TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

SCALARS = {
    "step": {name: f"train/{name}" for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")},
    "noise": {"critical_batch": "train/critical_batch"},
    "eval": {name: f"eval/{name}" for name in ("loss", "perplexity")},
}
"""For each kind of event, its numbers and the names of their curves."""


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """An event's curves and numbers; none for other kinds of events, and without the missing."""
    if event["event"] == "task":
        return {f"{event['task']}/{PurePath(event['file']).name}/{name}": value for name, value in event["metrics"].items()}
    tags = SCALARS.get(event["event"], {})
    return {tag: event[name] for name, tag in tags.items() if event.get(name) is not None}
