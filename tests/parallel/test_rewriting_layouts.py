"""T5, BART, prefix language modelling and UL2 learn the same on every layout, their batches made by each rank from (seed, step)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import KEYS, Keys, Learnt, Outcome, assert_same_training, layout, outcome, share
from pool import pool

from teratron.config import Config, UserError
from teratron.data.order import keyed
from teratron.data.special import SpecialTokens
from teratron.parallel.mesh import Mesh, check_layout, mesh_sizes
from teratron.train.engine import Engine

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
STEPS = 3


@dataclass(frozen=True)
class Drawn:
    """Endless rows of any ordinary tokens."""

    seq_length: int
    count: int | None = None

    def rows(self, index: np.ndarray) -> np.ndarray:
        return (keyed(5, np.asarray(index)[:, None], np.arange(self.seq_length + 1)) % np.uint64(ORDINARY)).astype(np.int64)


def train_rewriting(rank: int, ranks: int, keys: dict[str, Any]) -> Learnt:
    """Some steps on one rank; what it learnt, and the pieces of the state that it holds."""
    config = Config().override(keys)
    check_layout(config.model, config.parallel)
    engine = Engine(config, Mesh(mesh_sizes(config.parallel, ranks), rank))
    engine.optimizer.initialise(config.train.seed)
    needs = engine.objective.needs
    samples = Drawn(needs.length)
    special = SpecialTokens(VOCAB, ORDINARY, {role: ORDINARY + 1 + number for number, role in enumerate(needs.roles)})
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        index = np.arange(config.train.global_batch) + step * config.train.global_batch
        batch = share(engine, engine.objective.prepare(samples, index, special))
        tally, norm = engine.step(batch, step=step, number=step, lr=config.optim.lr)
        losses.append(tally.loss())
        norms.append(float(norm))
    return losses, norms, engine.optimizer.pieces()


@functools.cache
def single_process(kind: str) -> Outcome:
    return outcome([train_rewriting(0, 1, ALL[kind])])


def assert_layout_invisible(ranks: int, places: str, kind: str, **more: Any) -> None:
    found = outcome(pool().run(train_rewriting, ranks, {**ALL[kind], **layout(places), **more}))
    assert_same_training(found, single_process(kind), {})


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
    assert_layout_invisible(ranks, places, kind)


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
    assert_layout_invisible(ranks, places, kind)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ALL)
def test_recomputation_and_micro_batches_change_nothing(kind: str, recompute: str) -> None:
    found = outcome([train_rewriting(0, 1, {**ALL[kind], "train.micro_batch": 2, "train.recompute": recompute})])
    assert_same_training(found, single_process(kind), {})
