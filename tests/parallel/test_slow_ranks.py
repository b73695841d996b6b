"""What ranks tell of their steps: their own work without the waits, and who of them is slow, the same on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import engine_of
from pool import pool

from teratron.train.timing import PERSISTENT, Lap, Watch

pytestmark = pytest.mark.xdist_group("ranks")


def watch_of(rank: int, ranks: int, keys: dict[str, Any], told: list[str]) -> Watch:
    engine = engine_of(rank, ranks, keys)
    return Watch(engine.mesh, engine.optimizer, torch.device("cpu"), told.append)


def reports(rank: int, ranks: int, keys: dict[str, Any], own: list[float]) -> tuple[list[dict[str, Any]], list[str]]:
    """What a rank learns, time after time, when each rank's own work takes so long and all wait for the slowest."""
    told: list[str] = []
    watch, found = watch_of(rank, ranks, keys, told), []
    for _ in range(PERSISTENT + 1):
        watch._laps += [Lap(seconds=max(own), data=own[rank] / 4, communication=max(own) - own[rank])] * 3
        found.append(watch.report())
    return found, told


def waits(rank: int, ranks: int) -> tuple[float, float, float]:
    watch = watch_of(rank, ranks, {}, [])
    with watch.step() as lap:
        watch.mesh.all.sum(torch.ones(1000)).wait()
    return lap.seconds, lap.communication, lap.own


def test_all_ranks_learn_which_one_is_slow() -> None:
    found = pool().run(reports, 4, {}, [1.0, 1.0, 3.0, 1.25])
    for told, _ in found:
        assert all(report["seconds"] == [1.0, 1.0, 3.0, 1.25] for report in told)
        assert all(report["stragglers"] == [{"rank": 2, "times": 3.0}] for report in told)
        assert told[0]["data"] == 0.75
        assert told[0]["communication"] == 2.0
    assert all(said == ["rank 2 is slow: its own work takes 3 s a step, 3.0 times as long as its peers'"] for _, said in found)


def test_pipeline_stages_are_compared_within_themselves() -> None:
    for told, said in pool().run(reports, 4, {"parallel.pipeline": 2}, [1.0, 1.0, 3.0, 3.0]):
        assert all(report["stragglers"] == [] for report in told)
        assert said == []


def test_memory_is_of_the_rank_that_holds_most() -> None:
    whole, shared = (pool().run(reports, 2, {"parallel.shard": shard}, [1.0, 1.0])[0][0][0]["memory"] for shard in ("none", "optimizer"))
    assert whole["weights"] == whole["gradients"]
    assert whole["optimizer"] == 2 * whole["weights"]
    assert shared["optimizer"] == pytest.approx(whole["optimizer"] / 2, rel=0.01)
    assert whole["peak"] >= whole["now"] > whole["weights"]


def test_waiting_for_others_is_no_work_of_ones_own() -> None:
    for seconds, communication, own in pool().run(waits, 2):
        assert 0 < communication < seconds
        assert own == seconds - communication
