"""Low-rank adapters: merged into the weights that they stand beside."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry

LORA_A, LORA_B, MAGNITUDE = ".lora_a", ".lora_b", ".magnitude"


def merged(weights: Weights) -> Weights:
    """The same model without adapters: each weight becomes W + s B A, with magnitudes its rows are so long."""
    if not weights.config.adapter_rank:
        return weights
    beside = {entry.name: entry for entry in weights.parts}
    kept = [entry for entry in weights.parts if not entry.name.endswith((LORA_A, LORA_B, MAGNITUDE))]
    plain = replace(weights.config, adapter_rank=0, adapter_dora=False)
    run = None if weights.run is None else weights.run.override({"model.adapter_rank": 0, "model.adapter_dora": False})
    parts = [_merged(entry, beside, weights.config.adapter_scale) for entry in kept]
    return replace(weights, config=plain, run=run, parts=parts)


def _merged(entry: Entry, beside: dict[str, Entry], scale: float) -> Entry:
    layer = entry.name.removesuffix(".weight")
    if f"{layer}{LORA_B}" not in beside:
        return entry

    def values() -> Tensor:
        weight, a, b = (beside[name].values().double() for name in (entry.name, f"{layer}{LORA_A}", f"{layer}{LORA_B}"))
        total = torch.addmm(weight, b, a, alpha=scale)
        if f"{layer}{MAGNITUDE}" in beside:
            total *= (beside[f"{layer}{MAGNITUDE}"].values().double() / total.norm(dim=1)).unsqueeze(1)
        return total

    return entry._replace(values=values)
