"""How closely half precision and float8 follow the float32 loss curve: the same run in each, side by side.

    python bench/precision.py --text input.txt [--steps 500] [--only fp32 bf16] [--out runs/precision]

Every run is that of a small model with the same weights, batches and schedule. Runs that are there already are only told again.
On a CPU bf16's products of linear layers are computed as a GPU does, summed in float32 and rounded once: few CPUs can.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teratron import Config
from teratron.models.leaves import Linear
from teratron.models.products import Products
from teratron.optim import rounding
from teratron.train import Trainer

PURE = {"train.precision": "bf16", "optim.masters": "bf16"}
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train.precision": "bf16"},
    "bf16, no masters": PURE,
    "bf16, no masters, nearest": PURE,
    "fp8 tensor": {"train.precision": "fp8"},
    "fp8 row": {"train.precision": "fp8", "train.fp8_scaling": "row"},
    "fp8 row, no masters": {**PURE, "train.precision": "fp8", "train.fp8_scaling": "row"},
}
"""The first is what the others are compared with."""
MODEL = {"model.layers": 2, "model.hidden": 64, "model.heads": 2}
WINDOW = 50
"""Steps over which losses are averaged."""


class SummedInFloat32(Products):
    """Products of halves, rounded once."""

    def forward(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        y = (x.float() @ weight_OI.float().t()).to(x.dtype)
        return y if bias_O is None else y + bias_O

    def of_inputs(self, slope: Tensor, weight_OI: Tensor) -> Tensor:
        return super().of_inputs(slope.float(), weight_OI.float()).to(slope.dtype)

    def of_weight(self, slope: Tensor, x: Tensor) -> Tensor:
        return super().of_weight(slope.float(), x.float()).to(slope.dtype)


def train(name: str, text: Path, steps: int, folder: Path) -> None:
    """A run in its folder, unless it is there."""
    if name.endswith("nearest"):
        rounding._rounded = lambda values, bits: values.bfloat16().float()
    keys = {"data.text": (str(text),), "data.tokenizer": "chars", "train.steps": steps, "train.eval_every": 0, "log.tensorboard": False}
    keys |= MODEL | {"optim.warmup_steps": steps // 10, "checkpoint.every": 0} | RUNS[name]
    trainer = Trainer(Config.preset("shakespeare-char").override(keys), folder / file_name(name))
    if keys.get("train.precision") == "bf16" and trainer.device.type == "cpu":
        for leaf in (leaf for leaf in trainer.engine.model.modules() if isinstance(leaf, Linear)):
            leaf.products = SummedInFloat32()
    trainer.train()


def file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def curve(name: str, folder: Path) -> tuple[np.ndarray, float, float] | None:
    """Losses averaged over WINDOW steps, the held-out loss at the end, and the median seconds of a step; None = not there."""
    file = folder / file_name(name) / "metrics.jsonl"
    if not file.is_file():
        return None
    events = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    held_out = [event["loss"] for event in events if event["event"] == "eval"]
    if not held_out:
        return None
    losses = np.convolve([event["loss"] for event in steps], np.ones(WINDOW) / WINDOW, "valid")
    return losses, held_out[-1], float(np.median([event["seconds"] for event in steps]))


def table(folder: Path) -> str:
    """Of the runs that are there."""
    found = {name: made for name in RUNS if (made := curve(name, folder)) is not None}
    rows = [f"{'run':<28} {'loss':>8} {'against fp32':>13} {'largest':>9} {'held-out':>9} {'against fp32':>13} {'ms a step':>10}"]
    for name, (losses, held_out, seconds) in found.items():
        exact, exact_held_out, _ = found["fp32"]
        apart = losses / exact - 1
        rows.append(
            f"{name:<28} {losses[-1]:8.4f} {apart[-1]:+13.2%} {np.abs(apart).max():9.2%} {held_out:9.4f} "
            f"{held_out / exact_held_out - 1:+13.2%} {1000 * seconds:10.0f}"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    exact_rounding = rounding._rounded
    for name in options.only:
        if curve(name, options.out) is None:
            train(name, options.text, options.steps, options.out)
            rounding._rounded = exact_rounding
    print(table(options.out))


if __name__ == "__main__":
    main()
