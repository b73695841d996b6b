"""Float8 on layouts: with all else in float64 only scales can differ, and a layout is a small share of what float8 itself changes."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import Keys, batch_of, engine_of, layout, share
from pool import pool

from teratron.models.float8 import use_float8

pytestmark = pytest.mark.xdist_group("ranks")

KEYS: Keys = {"model.dropout": 0.0, "model.position": "rope", "optim.lr": 1e-3, "optim.name": "sgd", "train.micro_batch": 2}
LAYOUTS = [(4, "pipeline 2 zbv x tensor 2 x sequence"), (2, "shard parameters")]
STEPS = 3


def losses(rank: int, ranks: int, keys: Keys, scaling: str | None) -> list[float]:
    """Of some steps on one rank; scaling: None = everything in float64."""
    engine = engine_of(rank, ranks, keys)
    if scaling is not None:
        use_float8(list(engine.stages.stages().values()), scaling, (), torch.device("cpu"))
    found = []
    for step in range(1, STEPS + 1):
        tally, _ = engine.step(share(engine, batch_of(engine.config, step)), step=step, number=step, lr=engine.config.optim.lr)
        found.append(tally.loss())
    return found


@functools.cache
def alone(scaling: str | None) -> list[float]:
    return losses(0, 1, KEYS, scaling)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize(("ranks", "axes"), LAYOUTS)
def test_a_layout_changes_little(ranks: int, axes: str, scaling: str) -> None:
    found = pool().run(losses, ranks, KEYS | layout(axes), scaling)
    assert all(other == found[0] for other in found)
    of_float8 = max(abs(a - b) for a, b in zip(alone(scaling), alone(None), strict=True))
    of_layout = max(abs(a - b) for a, b in zip(found[0], alone(scaling), strict=True))
    print(axes, scaling, of_layout, of_float8)
    assert 0 < of_float8 < 0.1
    assert of_layout < 0.1 * of_float8
