"""Tiny trainings on any layout, and what comes out of them: the whole state, whatever it was cut into."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from parity import assert_parity
from pool import pool
from torch import Tensor

from teratron.config import Config
from teratron.models import State
from teratron.objectives import Batch, NextToken
from teratron.objectives.multi_token import Ahead
from teratron.parallel.boxes import Piece
from teratron.parallel.mesh import Mesh, check_layout, mesh_sizes
from teratron.train.engine import Engine

torch.set_num_threads(1)  # a second thread only costs on matrices this small

Keys = dict[str, Any]
"""Of a config, by their full names."""
VOCAB = 13
KEYS: Keys = {
    "model.layers": 2,
    "model.hidden": 16,
    "model.heads": 4,
    "model.seq_length": 8,
    "model.vocab_size": VOCAB,
    "model.vocab_multiple": 4,
    "model.init_std": 0.3,
    "model.dropout": 0.2,
    "optim.lr": 1e-2,
    "optim.clip": 0.1,
    "train.global_batch": 8,
    "train.precision": "fp64",
}
STEPS = 3


@dataclass(frozen=True)
class Outcome:
    """What a training did: per step, and its last state."""

    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]


Learnt = tuple[list[float], list[float], list[Piece]]
"""Losses and norms of one rank, and all pieces of the state that it holds."""


class AnyFamily(NextToken):
    """The next token's terms for every family: each with the inputs that it reads."""

    def inputs(self, batch: Batch) -> State:
        return {name: tensor for name, tensor in batch.items() if not name.endswith(("targets", "weights", "sample"))}


def config_of(keys: dict[str, Any]) -> Config:
    """The tiny config with keys replaced; a family that is no decoder is put in behind the check of its objective."""
    keys = KEYS | keys
    family = keys.pop("model.family", "gpt")
    config = Config().override(keys)
    object.__setattr__(config.model, "family", family)
    return config


def layout(name: str) -> Keys:
    """Keys of, such as, `pipeline 2 zbv x tensor 2 x sequence`: an axis with its degree, and what belongs to it; "" has none."""
    keys: Keys = {}
    for axis, *words in (part.split() for part in name.split(" x ") if part):
        if axis == "sequence":
            keys["parallel.sequence"] = True
        elif axis == "shard":
            keys["parallel.shard"] = words[0]
        else:
            keys[f"parallel.{axis}"] = int(words[0])
            if len(words) > 1:
                keys[{"pipeline": "parallel.schedule", "context": "parallel.context_method"}[axis]] = words[1]
            if len(words) > 2:
                keys["parallel.chunks"] = int(words[2])
    return keys


def engine_of(rank: int, ranks: int, keys: dict[str, Any]) -> Engine:
    """One rank's engine, its weights initialised."""
    config = config_of(keys)
    check_layout(config.model, config.parallel)
    engine = Engine(config, Mesh(mesh_sizes(config.parallel, ranks), rank), objective=AnyFamily(config))
    engine.optimizer.initialise(config.train.seed)
    return engine


def batch_of(config: Config, step: int, packed: bool = False, length: int = 0, silent: int = 0) -> Batch:
    """A global batch with uneven weights; packed: several documents a sample; silent: so many last rows weigh nothing."""
    draw = torch.Generator().manual_seed(step)
    count, length, vocab = config.train.global_batch, length or config.model.seq_length, config.model.vocab_size
    batch = {
        "tokens": torch.randint(vocab, (count, length), generator=draw),
        "targets": torch.randint(vocab, (count, length), generator=draw),
        "weights": torch.rand(count, length, generator=draw) * (torch.rand(count, length, generator=draw) > 0.3),
        "positions": torch.arange(length).expand(count, length),
        "sample": torch.arange(count) + step * count,
    }
    batch["weights"][count - silent :] = 0
    if packed:
        border = torch.randint(1, length, (count, 1), generator=draw)
        batch["segments"] = (batch["positions"] >= border).long()
        batch["positions"] = batch["positions"] - border * batch["segments"]
    if config.model.family == "encoder_decoder":
        memory = max(length - 3, 1)
        batch["encoder_tokens"] = torch.randint(vocab, (count, memory), generator=draw)
        batch["encoder_positions"] = torch.arange(memory).expand(count, memory)
        if packed:
            batch["encoder_segments"] = (batch["encoder_positions"] >= 1).long()
    return batch


def share(engine: Engine, batch: Batch) -> Batch:
    """A rank's rows of a global batch."""
    mine = engine.rows(engine.config.train.global_batch)
    return {name: tensor[mine] for name, tensor in batch.items()}


def train(
    rank: int, ranks: int, keys: dict[str, Any], packed: bool = False, length: int = 0, silent: int = 0, steps: int = STEPS
) -> Learnt:
    """Some steps on one rank; what it learnt, and the pieces of the state that it holds."""
    engine = engine_of(rank, ranks, keys)
    ahead = Ahead(engine.config)
    losses, norms = [], []
    for step in range(1, steps + 1):
        batch = batch_of(engine.config, step, packed, length, silent)
        batch = share(engine, batch | ahead.labels(batch))
        tally, norm = engine.step(batch, step=step, number=step, lr=engine.config.optim.lr)
        losses.append(tally.loss())
        norms.append(float(norm))
    return losses, norms, engine.optimizer.pieces()


def outcome(results: Iterable[Learnt]) -> Outcome:
    """One outcome from all ranks': they saw the same numbers, every element is saved once, and its copies are the same bit for bit."""
    results = list(results)
    losses, norms, _ = results[0]
    for other_losses, other_norms, _ in results[1:]:
        assert other_losses == losses
        assert other_norms == norms
    every = [piece for _, _, pieces in results for piece in pieces]
    state = assemble(piece for piece in every if piece.first)
    assert_copies(state, (piece for piece in every if not piece.first))
    return Outcome(losses, norms, state)


def assemble(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Whole tensors by name."""
    whole: dict[str, Tensor] = {}
    for piece in pieces:
        tensor = whole.setdefault(piece.name, torch.full(piece.shape, torch.nan, dtype=piece.values.dtype))
        for region, values in regions(piece):
            assert tensor[region].isnan().all(), f"{piece.name} {region} is held twice"
            tensor[region] = values
    missing = [name for name, tensor in whole.items() if tensor.isnan().any()]
    assert missing == []
    return whole


def assert_copies(state: dict[str, Tensor], pieces: Iterable[Piece]) -> None:
    """Pieces are what the whole tensors hold, bit for bit."""
    different = {piece.name for piece in pieces for region, values in regions(piece) if not torch.equal(values, state[piece.name][region])}
    assert different == set(), "copies have drifted apart"


def regions(piece: Piece) -> Iterable[tuple[tuple[slice, ...], Tensor]]:
    """Each box of a piece, as an index of the whole tensor, with its values."""
    values = piece.values
    for box in piece.boxes:
        yield box.slices(), values[: box.count].view(box.size)
        values = values[box.count :]
    assert not len(values)


IRRELEVANT = ("parallel.", "train.micro_batch", "train.recompute")
"""Keys that change nothing in the numbers, by how they begin."""


@functools.cache
def _single(keys: frozenset[tuple[str, Any]], *shape: int) -> Outcome:
    return outcome([train(0, 1, dict(keys), *shape)])


def single(keys: dict[str, Any], packed: bool = False, length: int = 0, silent: int = 0, steps: int = STEPS) -> Outcome:
    """The reference: one process, the whole batch at once, nothing recomputed."""
    relevant = frozenset((name, value) for name, value in keys.items() if not name.startswith(IRRELEVANT))
    return _single(relevant, packed, length, silent, steps)


def assert_layout_invisible(ranks: int, keys: dict[str, Any], *shape: int, tol: float = 1e-9) -> Outcome:
    """A layout's losses, norms, weights and moments are the single process's. Returns what it found."""
    found = outcome(pool().run(train, ranks, keys, *shape))
    assert_same_training(found, single(keys, *shape), keys, tol)
    return found


def assert_same_training(found: Outcome, expected: Outcome, keys: dict[str, Any], tol: float = 1e-9) -> None:
    """The same losses, norms and state within the tolerance; clipping was active.

    In float32 biases of keys are left out: softmax does not see them, so their gradient is nothing but rounding, which Adam enlarges.
    """
    clip = config_of(keys).optim.clip
    assert all(norm > clip > 0 for norm in expected.norms), "clipping was not active"
    for a, b in zip(found.losses + found.norms, expected.losses + expected.norms, strict=True):
        assert math.isclose(a, b, rel_tol=tol, abs_tol=0), (found.losses, expected.losses, found.norms, expected.norms)
    mute = "nothing" if config_of(keys).train.precision == "fp64" else ".k.bias"
    states = [{name: value for name, value in state.items() if not name.endswith(mute)} for state in (found.state, expected.state)]
    assert_parity(*states, tol, config_of(keys).optim.lr, len(found.losses))
