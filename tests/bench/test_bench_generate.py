"""The benchmark of generation compares like with like: all contenders continue prompts in the same way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from teratron.config import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

import generate as bench

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 256}


def test_contenders_agree_and_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bench.write_random(tmp_path, SHAPE)
    ways = bench.contenders(tmp_path, "fp32", ["plain", "lookup", "transformers"])
    results = {(batch, mode): bench.race(ways, batch, how, 6, 2) for batch in (1, 2) for mode, how in bench.MODES.items()}
    lines = bench.record(results, 6)
    assert len(lines) == 12
    assert all(line["first_is"] == 1 for line in lines if line["contender"] == "plain")
    assert all(line["tokens_per_second"] > 0 < line["first_token"] for line in lines)
    with pytest.raises(UserError, match="not the same computation"):
        bench.race({**ways, "other": lambda prompts, new, how: [[0] * new for _ in prompts]}, 1, bench.MODES["greedy"], 6, 1)
    with pytest.raises(UserError, match="--contenders vllm: expected some of plain"):
        bench.contenders(tmp_path, "fp32", ["vllm"])
