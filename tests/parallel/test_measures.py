"""Law 1 for clipping, per-part norms and the gradient noise scale: each layout sees what the single process sees."""

from __future__ import annotations

import pytest
from cases import Keys, assert_layout_invisible, batch_of, engine_of, layout, share
from pool import pool

from teratron.train.noise import probe
from teratron.train.norms import Norms

pytestmark = pytest.mark.xdist_group("ranks")

BASE: Keys = {"model.position": "rope", "optim.lr": 1e-3, "train.micro_batch": 1}
EXPERTS: Keys = {"model.experts": 4, "model.expert_ffn": 12, "model.init_std": 0.5, "model.router_balance": "none"}
CLIPPED: list[Keys] = [{"optim.clip_by": "value", "optim.clip": 1e-3}, {"optim.clip_by": "adaptive", "optim.clip": 1e-3}]
LAYOUTS = [("tensor 2 x shard parameters", 4, {}), ("pipeline 2 1f1b x shard optimizer", 4, {})]
MORE = [("expert 2 x tensor 2 x shard gradients", 4, EXPERTS), ("context 2 ring x shard parameters", 4, {})]


@pytest.mark.parametrize(
    ("axes", "ranks", "more"), [LAYOUTS[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in [LAYOUTS[1], *MORE])]
)
@pytest.mark.parametrize("clipped", CLIPPED)
def test_no_layout_changes_what_is_clipped(axes: str, ranks: int, more: Keys, clipped: Keys) -> None:
    assert_layout_invisible(ranks, BASE | more | clipped | layout(axes))


def measure(rank: int, ranks: int, keys: Keys) -> tuple[list[float], dict[str, list[float]]]:
    """The gradient norms over a batch and, before it, over another; and every part's norms in the update."""
    engine = engine_of(rank, ranks, keys)
    first, second = (share(engine, batch_of(engine.config, step)) for step in (1, 2))
    alone = float(probe(engine, second, 2, 8.0))
    norms = Norms(engine.optimizer, 8.0)
    _, whole = engine.step(first, step=1, number=1, lr=1e-2, loss_scale=8.0, around=norms)
    return [alone, float(whole)], norms.parts


@pytest.mark.parametrize(("axes", "ranks", "more"), [*LAYOUTS, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)])
def test_no_layout_changes_what_is_measured(axes: str, ranks: int, more: Keys) -> None:
    keys = BASE | more
    totals, parts = measure(0, 1, keys)
    assert totals[0] != pytest.approx(totals[1], rel=1e-3)
    assert sum(gradient**2 for gradient, _, _ in parts.values()) ** 0.5 == pytest.approx(totals[1], rel=1e-9)
    found = pool().run(measure, ranks, keys | layout(axes))
    for other_totals, _ in found:
        assert other_totals == pytest.approx(totals, rel=1e-9)
    names, values = list(parts), [number for part in parts.values() for number in part]
    told = found[0][1]
    assert sorted(told) == sorted(names)
    assert [number for name in names for number in told[name]] == pytest.approx(values, rel=1e-7, abs=1e-10)


def test_the_next_step_learns_nothing_from_what_was_probed() -> None:
    keys = BASE | {"optim.schedule": "constant"}
    plain, probed = engine_of(0, 1, keys), engine_of(0, 1, keys)
    probe(probed, batch_of(probed.config, 9), 9, 1.0)
    for engine in (plain, probed):
        engine.step(batch_of(engine.config, 1), step=1, number=1, lr=1e-2)
    for one, other in zip(plain.optimizer.pieces(), probed.optimizer.pieces(), strict=True):
        assert one.values.equal(other.values), one.name
