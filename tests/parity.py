"""How two states of the same training may differ (contract C1), and models of `transformers` under our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint import open_weights
from teratron.config import ModelConfig


def assert_parity(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tol: float, lr: float, steps: int) -> None:
    """Every tensor within tol of the expected one: max|a - b| <= tol * max(max|b|, lr * steps).

    The second term is how far the optimizer may have moved a weight: relative to its value alone, a weight that starts at zero
    and whose gradient is zero but for rounding would have to agree in its noise. tol is 1e-9 in float64 and 1e-4 in float32.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    wrong = []
    for name, b in expected.items():
        a = found[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        difference, bound = float((a - b).abs().max()), tol * max(float(b.abs().max()), lr * steps)
        if not difference <= bound:  # so written that NaN is wrong
            wrong.append(f"{name}: {difference:.3g} > {bound:.3g}")
    assert not wrong, "\n".join(wrong)


def read_weights(source: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model's config and all its parts, wherever they lie."""
    weights = open_weights(source)
    return weights.config, {entry.name: entry.values() for entry in weights.parts}


def gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """Gradients of a `transformers` model's parameters under our names; its weights are gone."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder)
    return read_weights(folder)[1]
