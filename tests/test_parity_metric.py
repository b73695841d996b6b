"""The parity metric itself: it lets rounding pass, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from parity import assert_parity
from torch import Tensor

EXPECTED = {"weight": torch.tensor([[1.0, -20.0], [0.5, 3.0]], dtype=torch.float64), "bias": torch.zeros(2, dtype=torch.float64)}
LR, STEPS = 1e-2, 5


def check(tol: float = 1e-9, **found: Tensor) -> None:
    assert_parity(EXPECTED | found, EXPECTED, tol, LR, STEPS)


def test_rounding_passes() -> None:
    check(weight=EXPECTED["weight"] + 19e-9, bias=EXPECTED["bias"] - 4.9e-11)


@pytest.mark.parametrize(
    "found",
    [
        {"weight": EXPECTED["weight"] + torch.tensor([[21e-9, 0], [0, 0]])},
        {"bias": torch.tensor([0.0, -5.1e-11], dtype=torch.float64)},
        {"bias": torch.tensor([0.0, math.nan], dtype=torch.float64)},
        {"weight": EXPECTED["weight"] * math.inf},
        {"bias": torch.zeros(2)},
        {"bias": torch.zeros(1, dtype=torch.float64)},
        {"another": torch.zeros(2)},
    ],
    ids=["relative", "absolute", "nan", "infinite", "dtype", "shape", "name"],
)
def test_a_difference_is_found(found: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError):
        check(**found)


def test_a_missing_tensor_is_found() -> None:
    with pytest.raises(AssertionError):
        assert_parity({"weight": EXPECTED["weight"]}, EXPECTED, 1e-9, LR, STEPS)


def test_the_bound_grows_with_the_tolerance() -> None:
    moved = EXPECTED["weight"] * (1 + 5e-5)
    check(1e-4, weight=moved)
    with pytest.raises(AssertionError, match=r"weight: 0.001 > 2e-08"):
        check(1e-9, weight=moved)
