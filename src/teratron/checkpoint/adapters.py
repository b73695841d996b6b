"""Low-rank adapters: merged into the weights that they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.models.adapters import SUFFIXES

Read = Callable[[], Tensor]


def merged(weights: Weights) -> Weights:
    """The same model without adapters: each weight becomes W + s B A, with magnitudes its rows are so long."""
    if not weights.config.adapter_rank:
        return weights
    base, beside = base_of(weights), {entry.name: entry for entry in weights.parts}
    return replace(base, parts=[_merged(entry, beside, weights.config.adapter_scale) for entry in base.parts])


def base_of(weights: Weights) -> Weights:
    """The model without its adapters and what they add."""
    run = None if weights.run is None else weights.run.override({"model.adapter_rank": 0, "model.adapter_dora": False})
    config = replace(weights.config, adapter_rank=0, adapter_dora=False)
    return replace(weights, config=config, run=run, parts=[entry for entry in weights.parts if not entry.name.endswith(SUFFIXES)])


def _merged(entry: Entry, beside: dict[str, Entry], scale: float) -> Entry:
    a, b, magnitude = (beside.get(entry.name.removesuffix(".weight") + suffix) for suffix in SUFFIXES)
    if a is None or b is None:
        return entry
    return with_product(entry, a.values, b.values, scale, None if magnitude is None else magnitude.values)


def with_product(entry: Entry, a: Read, b: Read, scale: float, magnitude: Read | None) -> Entry:
    """A weight with scale B A added to it and, where there are magnitudes, its rows made so long; computed in float64."""

    def values() -> Tensor:
        total = torch.addmm(entry.values().double(), b().double(), a().double(), alpha=scale)
        if magnitude is not None:
            total *= (magnitude().double() / total.norm(dim=1)).unsqueeze(1)
        return total.to(entry.dtype)

    return entry._replace(values=values)
