"""The benchmark of layouts: all cases of a batch take the same steps, and ratios are taken within rounds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from teratron.config import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

from parallel import CASES, Case, Lane, check_same, chosen, measure, ratio, tokens_per_second
from workloads import WORKLOADS

pytestmark = pytest.mark.xdist_group("ranks")

BY_NAME = {case.name: case for case in CASES}
TINY = replace(WORKLOADS["B"], shape=replace(WORKLOADS["B"].shape, layers=1, hidden=16, heads=2, kv_heads=2, ffn=32, seq_length=8), batch=2)


@pytest.mark.slow  # three processes that import everything
def test_layouts_run_in_turn_and_agree() -> None:
    lanes = measure(TINY, [BY_NAME["alone"], BY_NAME["tensor + sequence"]], "fp32", steps=1, rounds=2)
    assert [len(lane.seconds) for lane in lanes] == [2, 2]
    assert lanes[0].losses == pytest.approx(lanes[1].losses, rel=1e-4)
    assert lanes[0].losses[0] != lanes[0].losses[1]


def test_other_losses_are_refused() -> None:
    lanes = [Lane(BY_NAME["replicate"], [5.0, 4.0]), Lane(BY_NAME["shard optimizer"], [5.0, 4.01])]
    with pytest.raises(UserError, match=r"shard optimizer has loss 4.01\d* at step 2, replicate 4.0\d*: not the same step"):
        check_same(lanes, "fp32")
    check_same(lanes, "bf16")
    check_same([replace(lanes[0], case=BY_NAME["apart"]), lanes[1]], "fp32")  # whose processes learn from half as much


def test_ratios_are_of_tokens_and_within_rounds() -> None:
    """Two processes that take as long for two batches as one for one are twice as fast, however the machine drifts."""
    apart = Lane(Case("apart", 2, {}, 2), [], [1.0, 10.0, 100.0])
    together = Lane(Case("together", 2, {"parallel.shard": "none"}, 2, "apart"), [], [1.25, 12.5, 125.0])
    cut = Lane(Case("cut", 2, {"parallel.tensor": 2}, 1, "apart"), [], [1.25, 12.5, 125.0])
    assert ratio(together, [apart, together]) == pytest.approx(0.8)
    assert ratio(cut, [apart, cut]) == pytest.approx(0.4)
    assert tokens_per_second(TINY, apart) == 2 * TINY.tokens / 10


def test_a_case_brings_what_it_is_compared_with() -> None:
    assert [case.name for case in chosen("shard optimizer")] == ["replicate", "shard optimizer"]
    assert chosen(None) == list(CASES)
    with pytest.raises(UserError, match="--cases pipeline: expected some of alone, apart, replicate"):
        chosen("pipeline")
