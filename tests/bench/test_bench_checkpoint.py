"""The benchmark of checkpoints saves the whole state once with every contender, and loads it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

import checkpoint

MIB = 12


def test_every_contender_writes_the_state_once(tmp_path: Path) -> None:
    found = checkpoint.measure(tmp_path, MIB, rounds=1)
    assert len(found) == 4
    for result in found.values():
        assert MIB * 2**20 <= result["bytes"] < 1.01 * MIB * 2**20
        assert min(result["save"], result["stall"], result["load"]) > 0
