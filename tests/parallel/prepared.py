"""Tiny trainings whose batches each rank makes for itself from (seed, step), as a run does."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Keys, Learnt, Outcome, assert_same_training, layout, outcome, share
from pool import pool

from teratron.config import Config
from teratron.data.order import keyed
from teratron.data.special import SpecialTokens
from teratron.parallel.mesh import Mesh, check_layout, mesh_sizes
from teratron.train.engine import Engine

STEPS = 3


@dataclass(frozen=True)
class Drawn:
    """Endless rows of any tokens, some of which end documents."""

    seq_length: int
    vocab_size: int
    count: int | None = None

    def rows(self, index: np.ndarray) -> np.ndarray:
        return (keyed(5, np.asarray(index)[:, None], np.arange(self.seq_length + 1)) % np.uint64(self.vocab_size)).astype(np.int64)


def train_prepared(rank: int, ranks: int, keys: dict[str, Any]) -> Learnt:
    """Some steps on one rank; what it learnt, and the pieces of the state that it holds."""
    config = Config().override(keys)
    check_layout(config.model, config.parallel)
    engine = Engine(config, Mesh(mesh_sizes(config.parallel, ranks), rank))
    engine.optimizer.initialise(config.train.seed)
    samples = Drawn(engine.objective.needs.length or config.model.seq_length, config.model.vocab_size)
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
def _single(keys: frozenset[tuple[str, Any]]) -> Outcome:
    return outcome([train_prepared(0, 1, dict(keys))])


def alone(keys: Keys) -> Outcome:
    """The single process."""
    return _single(frozenset(keys.items()))


def assert_layout_invisible(ranks: int, places: str, keys: Keys, more: Keys | None = None) -> None:
    """A layout, with `more` keys that change no number, learns what the single process does."""
    found = outcome(pool().run(train_prepared, ranks, {**keys, **layout(places), **(more or {})}))
    assert_same_training(found, alone(keys), {})
