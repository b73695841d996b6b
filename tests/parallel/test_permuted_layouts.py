"""Permutation language modelling by two streams, with and without memory, learns the same on every layout; so does Transformer-XL."""

from __future__ import annotations

import pytest
from cases import KEYS, Keys
from prepared import alone, assert_layout_invisible

pytestmark = pytest.mark.xdist_group("ranks")

XLNET: Keys = {
    **KEYS,
    "model.family": "xlnet",
    "model.position": "transformer_xl",
    "model.norm_place": "post",
    "model.seq_length": 15,
    "model.attention_dropout": 0.3,
    "objective.name": "permuted",
    "objective.mask_rate": 0.3,
    "objective.max_ngram": 3,
    "data.isolate_documents": True,
}
MEMORY: Keys = {"model.seq_length": 24, "model.recurrence": 8, "objective.mask_rate": 0.5, "model.norm_place": "pre"}
UNTIED: Keys = {"model.tie_embeddings": False, "data.isolate_documents": False, "objective.label_smoothing": 0.1}
TRANSFORMER_XL: Keys = {
    "model.seq_length": 24,
    "model.recurrence": 8,
    "objective.name": "next_token",
    "objective.mask_rate": 0.15,
    "objective.max_ngram": 1,
}


@pytest.mark.parametrize(
    ("ranks", "places", "keys"),
    [
        (2, "tensor 2 x sequence", {}),
        (4, "pipeline 2 zb-h1 x tensor 2 x sequence", MEMORY),
        (4, "pipeline 2 1f1b x shard gradients", TRANSFORMER_XL),
    ],
    ids=str,
)
def test_two_streams_on_a_layout_are_the_single_process(ranks: int, places: str, keys: Keys) -> None:
    assert_layout_invisible(ranks, places, XLNET | keys, {"train.micro_batch": 2, "train.recompute": "selective"})


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, MEMORY, UNTIED, TRANSFORMER_XL], ids=["xlnet", "memory", "untied", "transformer-xl"])
@pytest.mark.parametrize(
    ("ranks", "places"),
    [
        (2, "tensor 2"),
        (4, "tensor 4 x sequence"),
        (2, "pipeline 2"),
        (2, "pipeline 2 interleaved"),
        (2, "pipeline 2 zbv"),
        (2, "shard optimizer"),
        (2, "shard gradients"),
        (2, "shard parameters"),
        (8, "pipeline 2 x tensor 2 x sequence x shard optimizer"),
    ],
)
def test_every_kind_on_every_layout(ranks: int, places: str, keys: Keys) -> None:
    layers = {"model.layers": 4} if places.endswith(("interleaved", "zbv")) else {}
    assert_layout_invisible(ranks, places, XLNET | keys | layers, {"train.recompute": "full"})


def test_memory_and_order_change_what_is_learnt() -> None:
    """Otherwise layouts would agree on nothing."""
    with_memory, without = alone(XLNET | MEMORY), alone({**XLNET, **MEMORY, "model.recurrence": 0})
    assert abs(with_memory.losses[0] - without.losses[0]) > 1e-3
    assert abs(alone(XLNET).losses[0] - alone(XLNET | TRANSFORMER_XL).losses[0]) > 1e-3
