"""Law 1 for every optimizer: twenty steps on each layout are those of the single process, in float64 to 1e-9."""

from __future__ import annotations

import pytest
from cases import Keys, Learnt, assert_same_training, layout, outcome, single, train
from pool import pool

from teratron.optim import OPTIMIZERS

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 20
BASE: Keys = {"model.dropout": 0.0, "model.position": "rope", "optim.lr": 1e-3, "train.micro_batch": 2}
MODELS: dict[str, Keys] = {
    "tied": {"model.kv_heads": 2},
    "apart": {"model.tie_embeddings": False, "model.activation": "swiglu", "model.norm": "rmsnorm"},
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


def train_all(rank: int, ranks: int, keys: Keys) -> dict[str, Learnt]:
    """On one rank, with one optimizer after the other."""
    return {name: train(rank, ranks, keys | {"optim.name": name}, steps=STEPS) for name in OPTIMIZERS}


@pytest.mark.parametrize(("model", "ranks", "axes"), [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_no_layout_changes_twenty_steps(model: str, ranks: int, axes: str) -> None:
    keys = BASE | MODELS[model] | layout(axes)
    found = pool().run(train_all, ranks, keys)
    for name in OPTIMIZERS:
        one = keys | {"optim.name": name}
        assert_same_training(outcome(learnt[name] for learnt in found), single(one, steps=STEPS), one)
