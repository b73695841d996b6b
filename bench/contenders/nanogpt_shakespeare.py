"""nanoGPT's CPU recipe for Shakespeare, from the text on: `python -m contenders.nanogpt_shakespeare TEXT FOLDER LOSS SEED`.

Its settings, initial values, loop, logging, estimates of losses and checkpoints; written anew after its README and train.py. After each
of its estimates a clock of its own stops while the loss of the whole validation split is computed, until that is at most LOSS. The last
line of output: that loss, the steps, and the seconds that the clock stood still.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from job import Shape
from torch import Tensor, nn

from contenders.nanogpt import GPT2

LENGTH, BATCH, STEPS, WARMUP = 64, 12, 2000, 100
RATE, LAST_RATE, BETAS, DECAY, CLIP = 1e-3, 1e-4, (0.9, 0.99), 0.1, 1.0
ESTIMATE_EVERY, ESTIMATES = 250, 20


def main() -> None:
    text, folder, target, seed = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(seed)
    vocab = prepare(text, folder)
    splits = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in ("train", "val")}
    model = GPT2(Shape(False, 4, 128, 4, 4, 512, LENGTH, vocab, False, True, 1e-5, 0.0))
    initialise(model)
    print(json.dumps(learn(model, splits, folder, target)))


def prepare(text: Path, folder: Path) -> int:
    """Characters as 16-bit numbers, nine tenths to learn from; returns how many there are."""
    data = text.read_text("utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(data)))}
    cut = int(len(data) * 0.9)
    for name, part in (("train", data[:cut]), ("val", data[cut:])):
        np.array([numbers[character] for character in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    return len(numbers)


def initialise(model: nn.Module) -> None:
    """Normal with 0.02, in what writes to the residual stream divided by the root of twice the layers."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02)


def learn(model: nn.Module, splits: Mapping[str, np.ndarray], folder: Path, target: float) -> dict[str, Any]:
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, best, still = torch.optim.AdamW(groups, lr=RATE, betas=BETAS), math.inf, 0.0
    for step in range(STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        if step % ESTIMATE_EVERY == 0:
            losses = {name: estimate(model, split) for name, split in splits.items()}
            if losses["val"] < best and step > 0:
                best = losses["val"]
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "ckpt.pt")
        if step and step % ESTIMATE_EVERY == 0:
            begun = time.perf_counter()
            loss = whole_loss(model, splits["val"])
            still += time.perf_counter() - begun
            if loss <= target:
                break
        x, y = draw(splits["train"])
        loss_of_step = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss_of_step.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"iter {step}: loss {loss_of_step.item():.4f}")
    return {"loss": loss, "steps": step, "still": still}


def rate(step: int) -> float:
    """Rises over the warm-up, then falls along a cosine."""
    if step < WARMUP:
        return RATE * (step + 1) / (WARMUP + 1)
    share = (step - WARMUP) / (STEPS - WARMUP)
    return LAST_RATE + 0.5 * (1 + math.cos(math.pi * share)) * (RATE - LAST_RATE)


def draw(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """Random windows [B, S], and what follows each of their characters."""
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
    rows = torch.stack([torch.from_numpy(tokens[start : start + LENGTH + 1].astype(np.int64)) for start in starts])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@torch.no_grad()
def estimate(model: nn.Module, tokens: np.ndarray) -> float:
    """Its own estimate of a split's loss."""
    batches = [draw(tokens) for _ in range(ESTIMATES)]
    return sum(float(F.cross_entropy(model(x).flatten(0, 1), y.flatten())) for x, y in batches) / ESTIMATES


@torch.no_grad()
def whole_loss(model: nn.Module, tokens: np.ndarray) -> float:
    """Mean over every character of the split, in windows that do not overlap."""
    numbers = torch.from_numpy(tokens.astype(np.int64))
    count = (len(numbers) - 1) // LENGTH * LENGTH
    x, y = numbers[:count].view(-1, LENGTH), numbers[1 : count + 1].view(-1, LENGTH)
    losses = [
        F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum") for a, b in zip(x.split(128), y.split(128), strict=True)
    ]
    return float(sum(losses)) / count


if __name__ == "__main__":
    main()
