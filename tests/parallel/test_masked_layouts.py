"""Masked language modelling with pairs of segments learns the same on every layout, its batches made by each rank from (seed, step)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import KEYS, Keys, Learnt, Outcome, assert_same_training, layout, outcome, share
from pool import pool

from teratron.config import Config
from teratron.data.order import keyed
from teratron.data.special import SpecialTokens
from teratron.parallel.mesh import Mesh, check_layout, mesh_sizes
from teratron.train.engine import Engine

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
STEPS = 3


@dataclass(frozen=True)
class Drawn:
    """Endless rows of any tokens, some of which end documents, so that pairs are short and rows are padded."""

    seq_length: int
    vocab_size: int
    count: int | None = None

    def rows(self, index: np.ndarray) -> np.ndarray:
        return (keyed(5, np.asarray(index)[:, None], np.arange(self.seq_length + 1)) % np.uint64(self.vocab_size)).astype(np.int64)


def train_masked(rank: int, ranks: int, keys: dict[str, Any]) -> Learnt:
    """Some steps on one rank; what it learnt, and the pieces of the state that it holds."""
    config = Config().override(BERT | keys)
    check_layout(config.model, config.parallel)
    engine = Engine(config, Mesh(mesh_sizes(config.parallel, ranks), rank))
    engine.optimizer.initialise(config.train.seed)
    samples = Drawn(engine.objective.needs.length, config.model.vocab_size)
    special = SpecialTokens(config.model.vocab_size, 3, {"mask": 1, "cls": 2, "sep": 3})
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        index = np.arange(config.train.global_batch) + step * config.train.global_batch
        batch = share(engine, engine.objective.prepare(samples, index, special))
        tally, norm = engine.step(batch, step=step, number=step, lr=config.optim.lr)
        assert all(mean > 0 for mean in tally.means().values())
        losses.append(tally.loss())
        norms.append(float(norm))
    return losses, norms, engine.optimizer.pieces()


@functools.cache
def single_process(keys: frozenset[tuple[str, Any]]) -> Outcome:
    return outcome([train_masked(0, 1, dict(keys))])


def assert_layout_invisible(ranks: int, places: str, keys: Keys) -> None:
    found = outcome(pool().run(train_masked, ranks, {**keys, **layout(places)}))
    assert_same_training(found, single_process(frozenset(keys.items())), {})


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
    assert_layout_invisible(ranks, places, keys)


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
    assert_layout_invisible(ranks, places, keys)
