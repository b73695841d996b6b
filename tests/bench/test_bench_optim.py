"""The benchmarks of optimizers time what they say: the same weights for all contenders, and curves read rightly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

import learning
import optim

from teratron.config import Config, ModelConfig
from teratron.optim import OPTIMIZERS

TINY = ModelConfig(layers=2, hidden=16, heads=2, vocab_size=40, seq_length=16)
CPU = torch.device("cpu")


def test_every_optimizer_has_a_row_and_each_update_moves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = optim.contenders(TINY, CPU)
    assert set(OPTIMIZERS) < set(rows)
    models: list[Any] = []
    plain = optim.filled
    monkeypatch.setattr(optim, "filled", lambda *args, **more: models.append(plain(*args, **more)) or models[-1])
    del rows["schedule_free"]  # moves what it averages; the weights follow when they are handed out
    for name, row in rows.items():
        update = row.build()
        before = [parameter.detach().clone() for parameter in models[-1].parameters()]
        update()
        moved = [not torch.equal(old, new) for old, new in zip(before, models[-1].parameters(), strict=True)]
        assert all(moved), name


def test_what_is_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = ("torch AdamW, fused", "adamw")
    rows = optim.contenders(TINY, CPU)
    monkeypatch.setattr(optim, "contenders", lambda *args: {name: rows[name] for name in keep})
    found = optim.measure(TINY, 2, CPU)
    assert set(found) == set(keep)
    assert all(row.milliseconds > 0 and row.share > 0 and row.ratio > 0 for row in found.values())


def test_slow_contenders_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "seconds", lambda run, device: run())
    assert len(optim.timed([lambda: 1.0], 7, CPU)) == 7
    assert len(optim.timed([lambda: 25.0], 7, CPU)) == 2, "the first of three warms up"
    assert optim.timed([lambda: 100.0], 7, CPU) == [[100.0]]


def test_curves_are_read_between_their_evaluations() -> None:
    curve = [(10, 3.0), (20, 2.0), (40, 1.5)]
    assert [learning.loss_at(curve, step) for step in (5, 10, 15, 20, 30, 50)] == [3.0, 3.0, 2.5, 2.0, 1.75, 1.5]
    assert learning.first_below(curve, 2.0) == 0.5
    assert learning.first_below(curve, 1.0) is None


def test_every_row_is_a_config_and_the_larger_batches_are_as_large() -> None:
    for name, row in learning.ROWS.items():
        config = learning.config_of(row)
        assert isinstance(config, Config)
        assert config.train.global_batch == learning.BATCH * (16 if name.endswith("x16") else 1)
        batch = learning.random_batch(config)
        assert batch["tokens"].shape == (config.train.global_batch, config.model.seq_length)
