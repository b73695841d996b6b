"""Tiny runs for tests: a text, a config, its command line, and what two runs are compared by."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint import newest_checkpoint
from teratron.config import Config

torch.set_num_threads(1)  # a second thread only costs on matrices this small, and much on a machine that is busy

KEYS: dict[str, Any] = {
    "model.layers": 1,
    "model.hidden": 16,
    "model.heads": 2,
    "model.seq_length": 8,
    "model.vocab_multiple": 8,
    "model.dropout": 0.2,
    "data.tokenizer": "chars",
    "data.split": "90,10",
    "optim.lr": 1e-2,
    "train.steps": 6,
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.eval_every": 3,
    "train.eval_batches": 2,
    "checkpoint.every": 2,
    "log.tensorboard": False,
}


def write_text(path: Path, words: int = 600, seed: int = 0) -> Path:
    """A small text of few words, in lines."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(["the", "cat", "sat", "on", "a", "mat", "quietly"], k=12)) for _ in range(words // 12)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def tiny(text: Path | str, **keys: Any) -> Config:
    """A config that trains in milliseconds; `model__layers=2` replaces `model.layers`."""
    return Config().override(KEYS | {"data.text": (str(text),)} | {name.replace("__", "."): value for name, value in keys.items()})


def options(**keys: Any) -> list[str]:
    """The command-line options of the tiny config; a value of None leaves a key out."""
    merged = KEYS | {name.replace("__", "."): value for name, value in keys.items()}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in merged.items() if value is not None]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's metrics."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [event for event in lines if event["event"] == kind]


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; of a step that ran twice the later line counts."""
    return {event["step"]: event["loss"] for event in events(run, "step")}


def state(run: Path) -> dict[str, Tensor]:
    """Weights and moments of a run's newest checkpoint."""
    checkpoint = newest_checkpoint(run, print)
    assert checkpoint is not None
    return checkpoint.load()


def assert_same_state(run: Path, other: Path) -> None:
    """Bit for bit."""
    a, b = state(run), state(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
