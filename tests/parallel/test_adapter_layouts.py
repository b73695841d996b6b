"""Adapters learn the same on every layout: states equal the single process's, and what is frozen stays as it began."""

from __future__ import annotations

import pytest
import torch
from cases import Keys, assert_layout_invisible, batch_of, engine_of, layout, share
from pool import pool

from teratron.models.adapters import SUFFIXES
from teratron.parallel.buckets import is_released

pytestmark = pytest.mark.xdist_group("ranks")
LORA: Keys = {"model.adapter_rank": 3, "model.adapter_alpha": 6.0, "optim.clip": 0.01}
DORA = LORA | {"model.adapter_dora": True}
FEW_HEADS: Keys = {"model.kv_heads": 2, "model.activation": "swiglu", "model.bias": False}
FIRST = [
    (4, LORA | FEW_HEADS, "tensor 4 x sequence"),
    (4, DORA, "pipeline 2 x tensor 2"),
    (2, LORA | {"train.recompute": "full"}, "shard parameters"),
    (4, DORA | {"model.adapter_targets": ("q", "v", "down"), "train.micro_batch": 1}, "pipeline 2 zbv x context 2"),
]
FURTHER = [
    (2, LORA, "tensor 2"),
    (2, DORA, "tensor 2 x sequence"),
    (4, DORA | FEW_HEADS, "tensor 4"),
    (4, LORA | {"model.adapter_targets": ("v", "gate", "up")} | FEW_HEADS, "tensor 2 x sequence x shard gradients"),
    (4, LORA | {"train.micro_batch": 1}, "pipeline 2 zb-h1 x tensor 2 x sequence"),
    (4, LORA | {"train.micro_batch": 2}, "pipeline 2 interleaved x shard optimizer"),
    (4, DORA | {"train.recompute": "selective"}, "context 2 all_to_all x tensor 2"),
    (4, LORA | {"model.family": "encoder_decoder", "model.position": "relative"}, "pipeline 2 x tensor 2 x sequence"),
    (4, DORA | {"model.family": "encoder", "train.recompute": "full"}, "tensor 2 x shard parameters"),
    (4, LORA | {"optim.groups": ("*.bias: lr=0.5",)}, "tensor 2 x sequence x shard parameters"),
    (
        4,
        LORA | {"model.experts": 4, "model.shared_experts": 1, "model.bias": False, "model.router_balance": "bias"},
        "expert 2 x shard parameters",
    ),
    (4, LORA | {"optim.name": "muon"}, "tensor 2 x shard optimizer"),
]


@pytest.mark.parametrize(("ranks", "keys", "name"), [*FIRST, *(pytest.param(*row, marks=pytest.mark.slow) for row in FURTHER)])
def test_layout_is_invisible(ranks: int, keys: Keys, name: str) -> None:
    found = assert_layout_invisible(ranks, keys | layout(name)).state
    if "optim.groups" in keys:
        return
    weights = {name.removeprefix("weight/") for name in found if name.startswith("weight/")}
    learnt = {name.partition("/")[2] for name in found if not name.startswith("weight/")}
    assert learnt == {name for name in weights if name.endswith(SUFFIXES)}
    before = {piece.name: piece.values.view(piece.shape) for piece in engine_of(0, 1, keys).optimizer.pieces()}
    assert {name for name in weights if not torch.equal(before[f"weight/{name}"], found[f"weight/{name}"])} == learnt


def most_gathered(rank: int, ranks: int, keys: Keys) -> list[int]:
    """Elements of frozen weights that are whole at once, at most, in the backward pass of each of two micro-batches."""
    engine = engine_of(rank, ranks, keys)
    flat, found = engine.flat, []
    frozen = [bucket.weights for bucket in flat.buckets if not bucket.trained and not bucket.sharding.keep_weights]
    arrived = flat._before_backward

    def watched(unit: object) -> None:
        arrived(unit)  # type: ignore[arg-type]
        found[-1] = max(found[-1], sum(weights.numel() for weights in frozen if not is_released(weights)))

    backward = flat.backward
    flat._before_backward = watched  # type: ignore[method-assign]
    flat.backward = lambda *what, **how: (found.append(0), backward(*what, **how))  # type: ignore[assignment, method-assign, misc]
    engine.step(share(engine, batch_of(engine.config, 1)), step=1, number=1, lr=1e-2)
    return [most // (sum(weights.numel() for weights in frozen) // engine.config.model.layers) for most in found]


def test_sharded_frozen_weights_are_whole_for_two_blocks_at_a_time() -> None:
    keys = (
        LORA
        | {"model.layers": 8, "train.micro_batch": 2, "model.tie_embeddings": False, "train.recompute": "full"}
        | layout("shard parameters")
    )
    for found in pool().run(most_gathered, 2, keys):
        assert found == [2, 2]
