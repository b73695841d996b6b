"""Heads that predict tokens ahead learn the same on every layout, with all that their blocks may be made of."""

from __future__ import annotations

from typing import Any

import pytest
from cases import assert_layout_invisible, layout, single

pytestmark = pytest.mark.xdist_group("ranks")

AHEAD = {"model.predict_tokens": 3, "objective.ahead_weight": 0.5}
EXPERTS = {"model.experts": 4, "model.router_balance": "bias", "model.aux_loss": 0.0}
UNTIED = {"model.tie_embeddings": False, "objective.label_smoothing": 0.1, "objective.contrastive": 0.3}
DEFAULT = [
    (4, "pipeline 2 zb-h1 x tensor 2 x sequence", (True, 7, 0), 2, {}),
    (4, "context 2 ring x shard parameters", (True, 8, 0), 1, UNTIED),
]
MORE = [
    (2, "tensor 2", (False, 8, 4), 2, UNTIED),
    (2, "pipeline 2 1f1b", (False, 8, 0), 1, UNTIED),
    (2, "context 2 all_to_all", (True, 7, 0), 0, {}),
    (4, "pipeline 2 zbv 2", (True, 8, 0), 1, {}),
    (4, "pipeline 2 interleaved 2 x shard optimizer", (False, 5, 0), 1, {"train.recompute": "full"}),
    (4, "tensor 2 x sequence", (False, 8, 0), 2, EXPERTS),
    (4, "shard gradients x tensor 2", (True, 8, 0), 1, EXPERTS),
    (8, "pipeline 2 1f1b x tensor 2 x sequence x context 2 ring", (True, 7, 0), 2, {}),
]


@pytest.mark.parametrize(
    ("ranks", "name", "shape", "micro_batch", "keys"), [*DEFAULT, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)], ids=str
)
def test_layouts_are_invisible(ranks: int, name: str, shape: tuple[bool, int, int], micro_batch: int, keys: dict[str, Any]) -> None:
    stages = {"model.layers": 4} if "pipeline" in name else {}
    assert_layout_invisible(ranks, {**AHEAD, **keys, **stages, **layout(name), "train.micro_batch": micro_batch}, *shape)


def test_every_head_learns() -> None:
    """Otherwise layouts would agree on nothing."""
    before, after = single(AHEAD, steps=1).state, single(AHEAD, steps=3).state
    heads = {name for name in after if name.startswith("weight/head.ahead.") and name.endswith("weight")}
    assert {name.split(".")[2] for name in heads} == {"2", "3"}
    assert not [name for name in heads if after[name].equal(before[name])]
