"""oneDNN's float32 products are taken on the CPUs that gain by them, and never where they round."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.train import float32
from teratron.train.float32 import choose_float32_products, float32_is_kept

SETTING = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def setting_as_it_was() -> Iterator[None]:
    before = SETTING.fp32_precision
    yield
    SETTING.fp32_precision = before


def rounding(x: Tensor, weight: Tensor) -> Tensor:
    return (x.bfloat16().double() @ weight.bfloat16().double().t()).float()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize(("gains", "rounds"), [(True, False), (True, True), (False, False)])
def test_taken_where_it_gains_and_keeps_the_precision(gains: bool, rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = SETTING.fp32_precision
    monkeypatch.setattr(float32, "amd_with_avx512", lambda: gains)
    monkeypatch.setattr(F, "linear", rounding if rounds else F.linear)
    choose_float32_products()
    assert SETTING.fp32_precision == ("bf16" if gains and not rounds and float32_is_kept() else before)


def test_rounded_products_are_told_from_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float32_is_kept()
    monkeypatch.setattr(F, "linear", rounding)
    assert not float32_is_kept()
