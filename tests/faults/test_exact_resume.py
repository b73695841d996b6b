"""Exact resume with all that could go wrong in it: dropout, accumulated gradients, a blend, a loss scale, a schedule."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from forked import counted, killed_after, server
from struck import Runs
from tiny import assert_same_state, write_text

from teratron.train.history import read_history

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 24
RICH = {
    "data__text": None,
    "data__tokenizer": None,
    "data__split": None,
    "model__layers": 2,
    "model__attention_dropout": 0.1,
    "optim__warmup_steps": 4,
    "train__steps": STEPS,
    "train__global_batch": 8,
    "train__eval_every": 5,
    "checkpoint__every": 3,
    "checkpoint__keep": 2,
    "parallel__shard": "none",
    "train__precision": "fp16",
    "optim__initial_loss_scale": 2**22,
    "optim__loss_scale_window": 3,
    "optim__loss_scale_hysteresis": 1,
}
"""Four micro-batches a step, a cosine after the warm-up, and overflows all along."""


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets with weights, as the command line takes them."""
    folder = tmp_path_factory.mktemp("blend")
    for seed, name in enumerate("ab"):
        text = write_text(folder / f"{name}.txt", seed=seed)
        command = ["data", "prepare", str(text), "--tokenizer", "bytes", "--output", str(folder / name)]
        assert server().run(1, command, folder).codes == [0]
    return ["--data.train", "0.7", str(folder / "a"), "0.3", str(folder / "b")]


@pytest.fixture(scope="module")
def whole(text: Path, blend: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a `run` that is never killed, and of `calls`, the function calls that it makes."""
    runs = Runs(tmp_path_factory.mktemp("whole"), text)
    assert train(runs, "run", blend, counted(0, runs.folder / "calls")) == [0]
    return runs.folder


def train(runs: Runs, name: str, blend: list[str], *blows: dict[str, Any]) -> list[int]:
    return runs.train(name, *blows, ranks=1, words=blend, **RICH).codes


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_a_run_killed_at_five_random_moments_equals_the_whole_one(forks: Runs, whole: Path, blend: list[str], seed: int) -> None:
    """Over all seeds: 20 kill points."""
    draw, calls = random.Random(seed), int((whole / "calls").read_text())
    moments = [draw.uniform(0.15, 0.35) * calls for _ in range(5)]
    codes = [train(forks, "run", blend, killed_after(0, int(moment))) for moment in moments]
    assert codes[:3] == [[-9]] * 3
    assert train(forks, "run", blend) == [0]
    histories = [read_history(folder / "metrics.jsonl") for folder in (whole / "run", forks.folder / "run")]
    assert histories[0].columns["loss"] == histories[1].columns["loss"]
    assert_same_state(whole / "run", forks.folder / "run")
    assert histories[0].of_kind("skip") != [], "no step overflowed: the loss scale has had nothing to do"
