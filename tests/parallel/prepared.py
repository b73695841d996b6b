"""Tiny trainings whose batches each rank makes for itself from (seed, step), as a run does."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    """Rows of any tokens."""
    engine = engine_of(rank, ranks, keys)
    model = engine.config.model
    samples = Drawn(engine.objective.needs.length or model.seq_length, model.vocab_size)
    return learn(engine, samples, SpecialTokens(model.vocab_size, 3, {"mask": 1, "cls": 2, "sep": 3}))


def engine_of(rank: int, ranks: int, keys: dict[str, Any]) -> Engine:
    """One rank's engine with the objective of its config, its weights initialised."""
    config = Config().override(keys)
    check_layout(config.model, config.parallel)
    engine = Engine(config, Mesh(mesh_sizes(config.parallel, ranks), rank))
    engine.optimizer.initialise(config.train.seed)
    return engine


def learn(engine: Engine, samples: Any, special: SpecialTokens) -> Learnt:
    """Some steps on one rank; what it learnt, and the pieces of the state that it holds."""
    count, losses, norms = engine.config.train.global_batch, [], []
    for step in range(1, STEPS + 1):
        batch = share(engine, engine.objective.prepare(samples, np.arange(count) + step * count, special))
        tally, norm = engine.step(batch, step=step, number=step, lr=engine.config.optim.lr)
        assert all(mean > 0 for name, mean in tally.means().items() if "accuracy" not in name)
        losses.append(tally.loss())
        norms.append(float(norm))
    return losses, norms, engine.optimizer.pieces()


Train = Callable[[int, int, dict[str, Any]], Learnt]
"""Of a rank, how many there are, and the config's keys."""


@functools.cache
def _single(train: Train, keys: frozenset[tuple[str, Any]]) -> Outcome:
    return outcome([train(0, 1, dict(keys))])


def alone(keys: Keys, train: Train = train_prepared) -> Outcome:
    """The single process."""
    return _single(train, frozenset(keys.items()))


def assert_layout_invisible(ranks: int, places: str, keys: Keys, more: Keys | None = None, train: Train = train_prepared) -> None:
    """A layout, with `more` keys that change no number, learns what the single process does."""
    found = outcome(pool().run(train, ranks, {**keys, **layout(places), **(more or {})}))
    assert_same_training(found, alone(keys, train), {name: value for name, value in keys.items() if name.startswith("optim.")})
