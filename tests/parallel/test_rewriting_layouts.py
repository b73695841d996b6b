"""T5, BART, prefix language modelling and UL2 learn the same on every layout, their batches made by each rank from (seed, step)."""

from __future__ import annotations

from typing import Any

import pytest
from cases import KEYS, Keys, Learnt, layout
from prepared import Drawn, assert_layout_invisible, engine_of, learn

from teratron.config import UserError
from teratron.data.special import SpecialTokens

pytestmark = pytest.mark.xdist_group("ranks")

VOCAB, ORDINARY = 40, 24
T5: Keys = {
    **KEYS,
    "model.family": "encoder_decoder",
    "model.seq_length": 16,
    "model.vocab_size": VOCAB,
    "model.norm": "rmsnorm",
    "model.activation": "relu",
    "model.position": "relative",
    "model.relative_buckets": 8,
    "model.relative_distance": 10,
    "model.scale_attention": False,
    "model.scale_output": True,
    "model.embedding_std": 1.0,
    "model.bias": False,
    "objective.name": "span_corruption",
}
T5_1_1: Keys = {**T5, "model.activation": "geglu_tanh", "model.tie_embeddings": False, "model.scale_output": False, "objective.name": "ul2"}
BART: Keys = {
    **KEYS,
    "model.family": "encoder_decoder",
    "model.seq_length": 16,
    "model.vocab_size": VOCAB,
    "model.norm_place": "post",
    "model.position_offset": 2,
    "model.embedding_norm": True,
    "model.attention_dropout": 0.3,
    "objective.name": "denoising",
    "objective.noise_density": 0.3,
}
PREFIX: Keys = {**KEYS, "model.seq_length": 16, "model.vocab_size": VOCAB, "model.attention_dropout": 0.3, "objective.name": "prefix"}
ALIBI: Keys = {**PREFIX, "model.position": "alibi"}
UL2: Keys = {**PREFIX, "model.position": "relative", "model.kv_heads": 2, "objective.name": "ul2"}
ALL = {"t5": T5, "t5-1.1": T5_1_1, "bart": BART, "prefix": PREFIX, "alibi": ALIBI, "ul2": UL2}


def train_rewriting(rank: int, ranks: int, keys: dict[str, Any]) -> Learnt:
    """Rows of ordinary tokens, beside which there are marks."""
    engine = engine_of(rank, ranks, keys)
    needs = engine.objective.needs
    special = SpecialTokens(VOCAB, ORDINARY, {role: ORDINARY + 1 + number for number, role in enumerate(needs.roles)})
    return learn(engine, Drawn(needs.length, ORDINARY), special)


@pytest.mark.parametrize(
    ("ranks", "places", "kind"),
    [
        (2, "tensor 2 x sequence", "t5"),
        (2, "pipeline 2 zb-h1", "t5"),
        (2, "context 2 all_to_all", "t5-1.1"),
        (2, "context 2 ring", "alibi"),
    ],
)
def test_a_layout_is_the_single_process(ranks: int, places: str, kind: str) -> None:
    assert_layout_invisible(ranks, places, ALL[kind], train=train_rewriting)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("ranks", "places"),
    [
        (2, "tensor 2"),
        (4, "tensor 2 x sequence x pipeline 2"),
        (2, "context 2 ring"),
        (4, "context 2 all_to_all x tensor 2"),
        (4, "pipeline 4"),
        (2, "pipeline 2 interleaved"),
        (2, "pipeline 2 zbv"),
        (4, "pipeline 2 x shard optimizer"),
        (2, "shard gradients"),
        (2, "shard parameters"),
    ],
)
def test_every_kind_on_every_layout(ranks: int, places: str, kind: str) -> None:
    if "ring" in places and ALL[kind].get("model.position") == "relative":
        with pytest.raises(UserError, match=r"model.position = relative is: choose --parallel.context_method all_to_all"):
            train_rewriting(0, 1, {**ALL[kind], **layout(places)})
        return
    if kind in ("prefix", "alibi", "ul2") and "pipeline 4" in places:
        places = "pipeline 2 dualpipev"
        ranks = 2
    assert_layout_invisible(ranks, places, ALL[kind], train=train_rewriting)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ALL)
def test_recomputation_and_micro_batches_change_nothing(kind: str, recompute: str) -> None:
    assert_layout_invisible(1, "", ALL[kind], {"train.micro_batch": 2, "train.recompute": recompute}, train_rewriting)
