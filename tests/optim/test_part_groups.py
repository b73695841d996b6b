"""Parts that are frozen get no gradient and no state; groups that cannot be are refused."""

from __future__ import annotations

import pytest
import torch
from trials import CONFIG, learn, made

from teratron.config import OptimConfig, ParallelConfig, UserError
from teratron.optim import build_optimizer
from teratron.optim.groups import Treatment, freeze, treatment_of
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Mesh
from teratron.parallel.stages import Stages


def test_frozen_parts_stay_and_have_no_state() -> None:
    config = OptimConfig(groups=("blocks.0.*: frozen", "blocks.*.ffn.*: frozen"))
    model = made()
    stages = Stages({0: model})
    freeze(stages, config)
    optimizer = build_optimizer(FlatModel(stages, Mesh(), ParallelConfig()), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in (1, 2):
        learn(optimizer, step, step, 1e-2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not name.startswith(("blocks.0.", "blocks.1.ffn."))}
    states = {piece.name.partition("/")[2] for piece in optimizer.pieces() if not piece.name.startswith("weight/")}
    weights = {piece.name.partition("/")[2] for piece in optimizer.pieces() if piece.name.startswith("weight/")}
    assert states == {name for name in weights if not name.startswith(("blocks.0.", "blocks.1.ffn."))}


def test_of_groups_that_match_the_same_part_later_ones_win() -> None:
    config = OptimConfig(weight_decay=0.3, groups=("*: lr=0.5", "blocks.0.*: frozen", "*.bias: decay=0.2", "*.q.*: lr=2"))
    parts = {part.name: part for part in Stages({0: made()}).parts()}
    assert treatment_of(parts["blocks.1.ffn.up.weight"], config, CONFIG) == Treatment(0.5, 0.3)
    assert treatment_of(parts["blocks.0.ffn.up.weight"], config, CONFIG) == Treatment(0.5, 0.3, frozen=True)
    assert treatment_of(parts["blocks.1.attention.q.bias"], config, CONFIG) == Treatment(2.0, 0.2)
    assert not treatment_of(parts["blocks.0.attention.q.weight"], config, CONFIG).frozen


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("blocks.*.atention.*: lr=2", "matches no part of the model: expected a pattern of names such as embedding.tokens.weight"),
        ("*.q.weight: frozen", "freezes blocks.0.attention.q.weight but not blocks.0.attention.k.weight, which lie in one matrix"),
        ("*: frozen", "freezes every part, and nothing is left to learn"),
    ],
)
def test_groups_that_cannot_be_are_refused(line: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        freeze(Stages({0: made(layers=CONFIG.layers)}), OptimConfig(groups=(line,)))
    assert said in str(refused.value)
