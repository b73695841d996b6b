"""A run moves over layouts through checkpoints, one step at each: it equals the single process that never stopped, in float64 to 1e-9."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from cases import Keys, Learnt, batch_of, config_of, engine_of, layout, outcome, share, single
from parity import assert_parity
from pool import pool

from teratron.checkpoint import TrainingState, load_training, newest_checkpoint, save_training

pytestmark = pytest.mark.xdist_group("ranks")

DENSE: Keys = {"model.layers": 4, "model.kv_heads": 2, "model.attention_dropout": 0.3, "train.micro_batch": 2}
MOE: Keys = {
    "model.layers": 4,
    "model.experts": 4,
    "model.expert_ffn": 12,
    "model.router_balance": "bias",
    "model.bias_rate": 0.01,
    "model.shared_experts": 1,
    "model.capacity": 1.2,
    "model.tie_embeddings": False,
    "train.micro_batch": 2,
}
MUON: Keys = {"optim.name": "muon", "model.position": "rope"}
LAMB: Keys = {"optim.name": "lamb", "model.position": "rope"}
Ring = list[tuple[int, str]]
FEW: Ring = [(4, "pipeline 2 zbv x tensor 2"), (4, "context 2 ring x shard parameters"), (1, "")]
MANY: Ring = [
    (4, "pipeline 2 dualpipev x context 2 all_to_all"),
    (4, "tensor 2 x sequence x shard gradients"),
    (4, "pipeline 4 1f1b"),
    (4, "context 4 ring"),
    (1, ""),
    (4, "pipeline 2 interleaved x shard parameters"),
    (8, "pipeline 2 zb-h1 x tensor 2 x shard optimizer"),
    (2, "context 2 all_to_all"),
    (4, "tensor 4"),
]
EXPERTS: Ring = [
    (4, "expert 4 x tensor 2 x sequence x shard optimizer"),
    (4, "expert 2 x pipeline 2 zb-h2"),
    (4, "expert 2 x context 2 ring"),
]
MANY_EXPERTS: Ring = [
    (4, "expert 4 x shard parameters"),
    (1, ""),
    (4, "tensor 2 x shard gradients"),
    (8, "expert 4 x pipeline 2 zbv x tensor 2 x sequence"),
    (4, "pipeline 4 gpipe"),
    (8, "expert 2 x context 2 all_to_all x pipeline 2 interleaved"),
]


def leg(rank: int, ranks: int, keys: Keys, folder: str, step: int) -> Learnt:
    """On one rank: load what the former layout has saved, if any, take a step, and save."""
    engine, run = engine_of(rank, ranks, keys), Path(folder)
    checkpoint = newest_checkpoint(run, print)
    if checkpoint is not None:
        load_training(checkpoint, engine.optimizer.pieces(), engine.mesh.control)
        engine.optimizer.publish()
    batch = share(engine, batch_of(engine.config, step))
    tally, norm = engine.step(batch, step=step, number=step, lr=engine.config.optim.lr)
    save_training(run, engine.config, engine.optimizer.pieces(), TrainingState(step), group=engine.mesh.control)
    return [tally.loss()], [norm], engine.optimizer.pieces()


@pytest.mark.parametrize(
    ("model", "ring"),
    [
        pytest.param(DENSE, FEW, id="dense"),
        pytest.param(MOE, EXPERTS, id="experts"),
        pytest.param(DENSE | MUON | {"optim.moments": "bf16"}, FEW, id="muon"),
        pytest.param(DENSE | LAMB, FEW, id="lamb", marks=pytest.mark.slow),
        pytest.param(MOE | LAMB, EXPERTS, id="lamb with experts", marks=pytest.mark.slow),
        pytest.param(MOE | MUON, [*EXPERTS, *MANY_EXPERTS], id="muon with experts", marks=pytest.mark.slow),
        pytest.param(DENSE, MANY, id="dense over every axis", marks=pytest.mark.slow),
        pytest.param(MOE, [*EXPERTS, *MANY_EXPERTS], id="experts over every axis", marks=pytest.mark.slow),
    ],
)
def test_a_run_moves_over_a_ring_of_layouts(tmp_path: Path, model: Keys, ring: Ring) -> None:
    route = [*ring, ring[0]]  # back where it began
    expected = single(model, steps=len(route))
    for step, (ranks, name) in enumerate(route, 1):
        found = outcome(pool().run(leg, ranks, model | layout(name), str(tmp_path), step))
        assert math.isclose(found.losses[0], expected.losses[step - 1], rel_tol=1e-9), (step, name)
        assert math.isclose(found.norms[0], expected.norms[step - 1], rel_tol=1e-9), (step, name)
    assert_parity(found.state, expected.state, 1e-9, config_of(model).optim.lr, len(route))
