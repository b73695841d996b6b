"""Law 1 for every optimizer: steps on each layout are those of the single process, in float64 to 1e-9."""

from __future__ import annotations

import pytest
from cases import Keys, Learnt, assert_layout_invisible, assert_same_training, layout, outcome, single, train
from pool import pool

from teratron.optim import OPTIMIZERS

pytestmark = pytest.mark.xdist_group("ranks")

NAMES = [name for name in OPTIMIZERS if name != "adamw"]
"""AdamW is what all other tests of layouts learn with."""
BASE: Keys = {"model.dropout": 0.0, "model.position": "rope", "optim.lr": 1e-3, "optim.schedule": "constant", "train.micro_batch": 2}
MODELS: dict[str, Keys] = {
    "tied": {"model.kv_heads": 2},
    "apart": {"model.tie_embeddings": False, "model.activation": "swiglu", "model.norm": "rmsnorm", "optim.moments": "bf16"},
    "experts": {"model.experts": 4, "model.expert_ffn": 12, "model.init_std": 0.5, "model.router_balance": "none"},
}
LAYOUTS = [
    ("tied", 4, "tensor 4 x sequence"),  # each key/value head on two ranks
    ("tied", 4, "pipeline 2 1f1b x shard optimizer"),
    ("apart", 4, "tensor 2 x shard parameters"),
    ("experts", 4, "expert 2 x tensor 2 x shard gradients"),
]
MORE = [
    ("tied", 2, ""),
    ("tied", 8, "tensor 2 x pipeline 2 zbv x shard optimizer"),
    ("apart", 8, "tensor 2 x sequence x shard gradients x replicate 2"),
    ("apart", 4, "context 2 ring x shard parameters"),
    ("experts", 8, "expert 4 x tensor 2 x sequence x shard optimizer"),
    ("experts", 4, "expert 2 x pipeline 2 1f1b"),
]


def train_all(rank: int, ranks: int, keys: Keys, names: list[str], steps: int) -> list[Learnt]:
    """On one rank, with one optimizer after the other."""
    return [train(rank, ranks, keys | {"optim.name": name}, steps=steps) for name in names]


def assert_invisible(model: str, ranks: int, axes: str, names: list[str], steps: int) -> None:
    keys = BASE | MODELS[model] | layout(axes)
    found = pool().run(train_all, ranks, keys, names, steps)
    for name, learnt in zip(names, zip(*found, strict=True), strict=True):
        one = keys | {"optim.name": name}
        assert_same_training(outcome(learnt), single(one, steps=steps), one)


@pytest.mark.parametrize(("model", "ranks", "axes"), LAYOUTS)
def test_no_layout_changes_a_few_steps(model: str, ranks: int, axes: str) -> None:
    assert_invisible(model, ranks, axes, NAMES, 3)


FROZEN: Keys = {"model.layers": 4, "optim.groups": ("blocks.1.*: frozen", "*.bias: lr=0.5 decay=0.1", "embedding.positions.*: frozen")}


@pytest.mark.parametrize("axes", ["pipeline 2 zbv", "tensor 2 x shard parameters"])
def test_groups_are_the_same_on_every_layout(axes: str) -> None:
    """One rank of the first holds a stage in which all is frozen."""
    keys = FROZEN | {"model.tie_embeddings": False, "train.micro_batch": 2} | layout(axes)
    found = assert_layout_invisible(4 if "shard" in axes else 2, keys)
    assert "moment1/blocks.2.attention.q.weight" in found.state
    assert "moment1/blocks.1.attention.q.weight" not in found.state


@pytest.mark.parametrize("axes", ["tensor 2 x sequence x pipeline 2 1f1b", "tensor 2 x shard parameters"])
def test_another_widths_settings_are_the_same_on_every_layout(axes: str) -> None:
    """muP at twice the width, heads twice as large: initial values, rates and scales."""
    keys: Keys = {"model.mup_base": 8, "model.mup_base_head": 2, "model.position": "rope", "train.micro_batch": 2}
    assert_layout_invisible(4, keys | layout(axes))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("model", "ranks", "axes"), [*LAYOUTS, *MORE])
def test_no_layout_changes_twenty_steps(model: str, ranks: int, axes: str, name: str) -> None:
    assert_invisible(model, ranks, axes, [name], 20)
