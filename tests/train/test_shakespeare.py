"""nanoGPT's CPU recipe on Shakespeare's plays: as good as published, and already on its way after 150 steps."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from teratron.config import Config
from teratron.train import Trainer


def held_out_loss(shared: Path, run: Path, preset: str = "shakespeare-char", **keys: Any) -> float:
    """Train a preset; its loss over the whole held-out tenth, in nats a character."""
    changed = {name.replace("__", "."): value for name, value in keys.items()}
    fixed = {"data.text": (str(shared / "data" / "tinyshakespeare" / "input.txt"),), "train.eval_every": 0, "log.tensorboard": False}
    config = Config.preset(preset).override(fixed | changed)
    return Trainer(config, run, device="cpu", echo=False).train().valid_loss


@pytest.mark.slow
def test_three_seeds_reach_the_published_loss(shared: Path, tmp_path: Path) -> None:
    """nanoGPT publishes 1.88 on 20 sampled batches; run again over the whole held-out part it gives 1.886 to 1.899."""
    losses = [held_out_loss(shared, tmp_path / str(seed), train__seed=seed) for seed in (1, 2, 3)]
    assert max(losses) <= 1.91, losses
    assert fmean(losses) <= 1.90, losses


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_fast_recipe_reaches_it_in_150_steps(seed: int, shared: Path, tmp_path: Path) -> None:
    assert held_out_loss(shared, tmp_path / "run", "shakespeare-fast", train__seed=seed) <= 1.89


@pytest.mark.slow
def test_150_steps_are_on_the_way(shared: Path, tmp_path: Path) -> None:
    """A learning rate so high that it takes a warm-up, a decay and clipping to learn well: 2.391 to 2.402 over three seeds.

    Without a warm-up it is 2.59, without clipping 2.45, with a warm-up that never ends 2.47, a decay that ends at step 50 2.46, a
    learning rate that stays at its lowest 2.49.
    """
    keys = {"train__steps": 150, "optim__lr": 5e-3, "optim__min_lr": 5e-4, "optim__warmup_steps": 20}
    assert held_out_loss(shared, tmp_path / "run", **keys) <= 2.43
