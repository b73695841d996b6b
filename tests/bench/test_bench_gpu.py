"""The GPU benchmark runs as a whole on a CPU, its checks can fail, and it chooses as many layers as fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

import gpu
from gpu_checks import Check, checks, losses
from gpu_times import LLAMA, TINY, Time, batches, fitting_layers, step_row

CPU = torch.device("cpu")


@pytest.mark.slow
def test_all_of_it_runs_small_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--steps", "1", "--json", str(path)])
    assert gpu.main() == 0
    found = json.loads(path.read_text())
    assert all(check["good"] for check in found["checks"].values())
    assert all(row["flops"] > 0 for row in found["times"].values())
    assert capsys.readouterr().out.count("ok") >= len(found["checks"])


@pytest.mark.parametrize("part", ["GPT-2, fp64", "GPT-2, fp8", "float8 product with scales of rows", "attention by flash"])
def test_checks_hold_on_a_cpu(part: str) -> None:
    found = [run() for name, run in checks(CPU, tiny=True) if part in name]
    assert found
    assert all(check.good for check in found)


def test_another_model_is_told_from_its_twin() -> None:
    assert losses({"train.precision": "fp64", "optim.beta1": 0.5}, CPU) == 0  # the twin has the same keys
    assert losses({"train.precision": "fp8"}, CPU) > 1e-6
    assert not Check("", 0.2, 0.1).good


def test_a_row_is_timed_and_its_kinds_add_up() -> None:
    name, run = step_row("tiny", LLAMA | TINY | batches(1, 2) | {"train.precision": "fp32"}, CPU, 1)
    found = run()
    assert (found.name, name) == (name, "tiny, fp32, 1 x 2")
    assert found.tokens_per_second > 0
    assert len(gpu.cells(found, ["products", "host"])) == 7


@pytest.mark.slow
def test_layers_fit_as_the_dry_run_says() -> None:
    keys = LLAMA | TINY | batches(1, 1) | {"model.layers": 32, "train.precision": "bf16"}
    few, more = (fitting_layers(keys, size) for size in (2.0**23, 2.0**24))
    assert 1 <= few < more < 32
    assert fitting_layers(keys, 2.0**40) == 32


def test_a_row_that_fails_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Time:
        raise torch.OutOfMemoryError("too large")

    assert gpu.attempt("large", fail) == "out of memory"
    assert gpu.attempt("broken", lambda: 1 / 0) == "ZeroDivisionError: division by zero"
    first, second = gpu.tables({"a": "broken", "b": Check("b", 1.0, 0.5)}, {"large": "out of memory"})
    assert (first.row_count, second.row_count) == (2, 1)
    capsys.readouterr()
