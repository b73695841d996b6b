"""Evaluation: the mean over every held-out token, however the batches are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import losses, tiny, write_text

from teratron.config import UserError
from teratron.data.indexed import IndexedDataset
from teratron.train import Trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("evaluate") / "text.txt", words=240)


def trainer(text: Path, run: Path, **keys: Any) -> Trainer:
    settings = {"train__precision": "fp64", "train__eval_batches": 0, "model__init_std": 0.5} | keys
    return Trainer(tiny(text, **settings), run, device="cpu", echo=False)


def direct_mean(made: Trainer, windows: int | None = None) -> tuple[float, int]:
    """The mean loss of the held-out tokens, one window at a time without batch or padding; and how many targets there are."""
    tokens = np.asarray(IndexedDataset(made.run / "data" / "text").tokens, np.int64)
    held_out = torch.from_numpy(tokens[int(len(tokens) * 0.9) :])
    length, total = made.config.model.seq_length, 0.0
    starts = list(range(0, len(held_out) - 1, length))[:windows]
    count = 0
    for start in starts:
        row = held_out[start : start + length + 1]
        positions = torch.arange(len(row) - 1)[None]
        with torch.no_grad():
            hidden = made.engine.model({"tokens": row[None, :-1], "positions": positions})["hidden"]
            total += float(F.cross_entropy(made.engine.model.head.output(hidden)[0], row[1:], reduction="sum"))
        count += len(row) - 1
    return total / count, count


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(1, 0), (3, 1), (4, 2), (64, 0), (64, 16)])
def test_every_token_counts_once_whatever_the_batches(text: Path, tmp_path: Path, global_batch: int, micro_batch: int) -> None:
    made = trainer(text, tmp_path / "run", train__global_batch=global_batch, train__micro_batch=micro_batch)
    expected, count = direct_mean(made)
    assert count % made.config.model.seq_length, "the last window is a partial one"
    assert made.data.valid_tokens == count
    assert made.evaluate() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batches", [1, 2])
def test_fewer_batches_are_the_first_ones(text: Path, tmp_path: Path, batches: int) -> None:
    made = trainer(text, tmp_path / "run", train__eval_batches=batches)
    some, _ = direct_mean(made, windows=batches * made.config.train.global_batch)
    assert made.evaluate() == pytest.approx(some, rel=1e-12)
    assert some != pytest.approx(direct_mean(made)[0], rel=1e-6), "or the limit could not be seen"


def test_nothing_is_dropped_and_nothing_is_changed(text: Path, tmp_path: Path) -> None:
    made = trainer(text, tmp_path / "run", model__dropout=0.5)
    before = [bucket.master.clone() for bucket in made.engine.flat.buckets]
    assert made.evaluate() == made.evaluate() == pytest.approx(direct_mean(made)[0], rel=1e-12)
    assert all(torch.equal(a, bucket.master) for a, bucket in zip(before, made.engine.flat.buckets, strict=True))
    assert all(float(bucket.gradient.abs().max()) == 0 for bucket in made.engine.flat.buckets)


def test_evaluation_is_never_smoothed(text: Path, tmp_path: Path) -> None:
    made = trainer(text, tmp_path / "run", objective__label_smoothing=0.3)
    assert made.evaluate() == pytest.approx(direct_mean(made)[0], rel=1e-12)
    made.train()
    (first, *_) = losses(tmp_path / "run").values()
    trainer(text, tmp_path / "plain").train()
    assert first != pytest.approx(next(iter(losses(tmp_path / "plain").values())), rel=1e-3), "or training would not be smoothed either"


def test_without_held_out_data_there_is_nothing_to_evaluate(text: Path, tmp_path: Path) -> None:
    made = trainer(text, tmp_path / "run", data__split="1,0")
    assert made.data.valid is None
    with pytest.raises(UserError, match="no held-out data"):
        made.evaluate()
