"""Masked language modelling with pairs of segments learns the same on every layout, its batches made by each rank from (seed, step)."""

from __future__ import annotations

import pytest
from cases import KEYS, Keys
from prepared import assert_layout_invisible

pytestmark = pytest.mark.xdist_group("ranks")

BERT: Keys = {
    **KEYS,
    "model.family": "encoder",
    "model.token_types": 2,
    "model.norm_place": "post",
    "model.embedding_norm": True,
    "model.head_transform": True,
    "model.pooler": True,
    "model.seq_length": 16,
    "model.attention_dropout": 0.3,
    "objective.name": "masked",
    "objective.sentence": "next",
    "objective.max_ngram": 2,
    "objective.mask_rate": 0.3,
}
PRE: Keys = {"model.norm_place": "pre", "objective.sentence": "order", "model.kv_heads": 2}
ROBERTA: Keys = {"model.pooler": False, "objective.sentence": "none", "model.position_offset": 2, "model.token_types": 1}


@pytest.mark.parametrize(
    ("ranks", "places", "keys"),
    [
        (2, "tensor 2 x sequence", {}),
        (2, "context 2 ring", PRE),
        (4, "pipeline 2 zb-h1 x shard optimizer", ROBERTA),
    ],
    ids=str,
)
def test_bert_on_a_layout_is_the_single_process(ranks: int, places: str, keys: Keys) -> None:
    assert_layout_invisible(ranks, places, BERT | keys)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, PRE, ROBERTA], ids=["bert", "megatron-bert", "roberta"])
@pytest.mark.parametrize(
    ("ranks", "places"),
    [
        (2, "tensor 2"),
        (4, "tensor 4 x sequence"),
        (2, "context 2 all_to_all"),
        (2, "pipeline 2"),
        (2, "pipeline 2 interleaved"),
        (2, "shard optimizer"),
        (2, "shard gradients"),
        (2, "shard parameters"),
        (8, "pipeline 2 x tensor 2 x sequence x context 2 ring"),
    ],
)
def test_every_kind_of_bert_on_every_layout(ranks: int, places: str, keys: Keys) -> None:
    if "tensor 4" in places and "model.kv_heads" in keys:
        keys = {**keys, "model.kv_heads": 4}
    assert_layout_invisible(ranks, places, BERT | keys)
