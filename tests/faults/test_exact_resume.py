"""Exact resume with all that could go wrong in it: dropout, accumulated gradients, a blend, a loss scale, a schedule; other layouts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from forked import counted, killed_after, server
from parity import assert_parity
from struck import Runs
from tiny import assert_same_state, state, write_text

from teratron.train.history import read_history

pytestmark = pytest.mark.xdist_group("ranks")

STEPS, LR = 24, 1e-2
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
    "parallel__tensor": 1,
    "parallel__sequence": "false",
    "parallel__pipeline": 1,
    "parallel__context": 1,
}
"""Four micro-batches a step, and a cosine after the warm-up; all degrees, as a run keeps its own where the command names none."""
SCALED = {"optim__initial_loss_scale": 2**22, "optim__loss_scale_window": 3, "optim__loss_scale_hysteresis": 1}
"""Of fp16: overflows all along."""


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
    """fp16 and fp64: runs of a process that is never killed; beside them the function calls that the first one makes."""
    runs = Runs(tmp_path_factory.mktemp("whole"), text)
    for precision in ("fp16", "fp64"):
        end = train(runs, precision, blend, 1, counted(0, runs.folder / "calls"), **keys_of(precision))
        assert end == [0]
        (runs.folder / "calls").rename(runs.folder / f"calls-{precision}")
    return runs.folder


def keys_of(precision: str) -> dict[str, Any]:
    return {"train__precision": precision, **(SCALED if precision == "fp16" else {})}


def train(runs: Runs, name: str, blend: list[str], ranks: int, *blows: dict[str, Any], **keys: Any) -> list[int]:
    return runs.train(name, *blows, ranks=ranks, words=blend, **RICH | keys).codes


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_a_run_killed_at_five_random_moments_equals_the_whole_one(forks: Runs, whole: Path, blend: list[str], seed: int) -> None:
    """Over all seeds: 20 kill points."""
    draw, calls = random.Random(seed), int((whole / "calls-fp16").read_text())
    moments = [draw.uniform(0.15, 0.35) * calls for _ in range(5)]
    codes = [train(forks, "run", blend, 1, killed_after(0, int(moment)), **keys_of("fp16")) for moment in moments]
    assert codes[:3] == [[-9]] * 3
    assert train(forks, "run", blend, 1, **keys_of("fp16")) == [0]
    histories = [read_history(folder / "metrics.jsonl") for folder in (whole / "fp16", forks.folder / "run")]
    assert histories[0].columns["loss"] == histories[1].columns["loss"]
    assert_same_state(whole / "fp16", forks.folder / "run")
    assert histories[0].of_kind("skip") != [], "no step overflowed: the loss scale has had nothing to do"


LAYOUTS = [
    (2, {"parallel__shard": "parameters"}),
    (1, {}),
    (2, {"parallel__tensor": 2, "parallel__sequence": "true"}),
    (2, {"parallel__pipeline": 2}),
    (2, {"parallel__context": 2}),
    (2, {"parallel__shard": "optimizer"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_on_one_layout_goes_on_on_another(forks: Runs, whole: Path, blend: list[str], seed: int) -> None:
    """In float64 to 1e-9 of the single process (contract C1)."""
    draw, calls = random.Random(seed), int((whole / "calls-fp64").read_text())
    keys = keys_of("fp64")
    for ranks, layout in draw.sample(LAYOUTS, 3):
        moment = int(draw.uniform(0.3, 0.5) * calls)
        codes = train(forks, "run", blend, ranks, killed_after(draw.randrange(ranks), moment), **keys | layout)
        assert -9 in codes or codes == [0] * ranks, codes
    ranks, layout = draw.choice(LAYOUTS)
    assert train(forks, "run", blend, ranks, **keys | layout) == [0] * ranks
    found, expected = (read_history(folder / "metrics.jsonl").columns for folder in (forks.folder / "run", whole / "fp64"))
    assert found["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-9)
    assert_parity(state(forks.folder / "run"), state(whole / "fp64"), 1e-9, LR, STEPS)
