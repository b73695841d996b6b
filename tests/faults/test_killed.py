"""Ranks killed anywhere: the same command goes on from the newest whole checkpoint, to the same numbers bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from forked import EVERY, KILL, blow, killed_after
from struck import Runs

pytestmark = pytest.mark.xdist_group("ranks")

STEP, FORMAT, TRAINING = "teratron.train.engine:Engine.step", "teratron.checkpoint.format", "teratron.checkpoint.training"
VALUES = "teratron.checkpoint.stream:_put_values"
HALF_A_FILE = f"args[1](bytes(64)); {KILL}"
HALF_REMOVED = f"os.unlink(args[0] / 'manifest.json'); {KILL}"

CASES = {
    "before the first checkpoint": (1, STEP, 2, KILL, 0),
    "rank 0 in a forward pass": (0, "torch.nn.functional:scaled_dot_product_attention", 9, KILL, None),
    "rank 1 in the update": (1, "teratron.optim.optimizer:Optimizer.step", 5, KILL, 4),
    "rank 0 in an evaluation": (0, "teratron.train.engine:Engine.evaluate", 1, KILL, 2),
    "rank 0 before it writes": (0, f"{FORMAT}:_write_safetensors", 2, KILL, 2),
    "rank 1 before it writes": (1, f"{FORMAT}:_write_safetensors", 3, KILL, 4),
    "rank 0 in its file": (0, VALUES, 40, HALF_A_FILE, None),
    "rank 1 in its file": (1, VALUES, 40, HALF_A_FILE, None),
    "rank 0 before the manifest": (0, f"{FORMAT}:_seal", 2, KILL, 2),
    "rank 0 before it publishes": (0, f"{FORMAT}:publish", 2, KILL, 2),
    "rank 1 when it reads back": (1, "teratron.checkpoint.reader:Checkpoint.verify", 2, KILL, 4),
    "rank 0 before it removes old ones": (0, f"{TRAINING}:remove_old", 3, KILL, 6),
    "both at once": (EVERY, STEP, 6, KILL, 4),
    "rank 0 in the report": (0, "teratron.train.trainer:write_report", 1, KILL, 8),
}
"""Rank, place, which time, deed, and the step of the checkpoint that is gone on from; None = it does not matter which."""
QUICK = {"rank 1 in the update", "rank 1 in its file", "rank 0 before it publishes", "both at once"}


def marked(cases: dict[str, tuple[object, ...]], quick: set[str]) -> list[object]:
    return [pytest.param(*case, id=name, marks=() if name in quick else pytest.mark.slow) for name, case in cases.items()]


@pytest.mark.parametrize(("rank", "place", "call", "deed", "step"), marked(CASES, QUICK))
def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(
    forks: Runs, undisturbed: Path, rank: int, place: str, call: int, deed: str, step: int | None
) -> None:
    end = forks.train("run", blow(rank, place, call, deed))
    assert end.codes[max(rank, 0)] == -9, end.text
    newest = max(forks.saved("run"), default=0)
    assert step in (None, newest)
    forks.assert_goes_on("run", max(newest, 0), undisturbed)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_a_rank_may_be_killed_at_any_moment(forks: Runs, undisturbed: Path, seed: int) -> None:
    rank = seed % 2
    calls = int((undisturbed.parent / f"calls-{rank}").read_text())
    end = forks.train("run", killed_after(rank, int(random.Random(seed).uniform(0.1, 0.9) * calls)))
    assert end.codes[rank] == -9, end.text
    forks.assert_goes_on("run", max(forks.saved("run"), default=0), undisturbed)


def test_a_rank_killed_while_an_old_checkpoint_is_removed(forks: Runs, undisturbed: Path) -> None:
    """What is left of it passes for none, and goes."""
    keys = {"checkpoint__keep": 1}
    assert forks.train("run", blow(0, f"{TRAINING}:_remove", 1, HALF_REMOVED), **keys).codes[0] == -9
    assert forks.saved("run") == [2, 4]
    forks.assert_goes_on("run", 4, undisturbed, **keys)
    assert forks.saved("run") == [8]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_while_it_writes_beside_training(forks: Runs, undisturbed: Path, rank: int) -> None:
    keys = {"checkpoint__asynchronous": True}
    assert forks.train("run", blow(rank, VALUES, 40, HALF_A_FILE), **keys).codes[rank] == -9
    forks.assert_goes_on("run", max(forks.saved("run"), default=0), undisturbed, **keys)


@pytest.mark.slow
def test_what_memory_holds_is_gone_on_from(forks: Runs, undisturbed: Path) -> None:
    keys = {"checkpoint__memory_every": 1}
    assert forks.train("run", blow(EVERY, STEP, 6), **keys).codes == [-9, -9]
    assert max(forks.saved("run")) == 4
    forks.assert_goes_on("run", 5, undisturbed, **keys)
