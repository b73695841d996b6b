"""Law 1 for layouts that runs would use: several parallelisms at once, up to eight ranks, each against the single process."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Keys, assert_layout_invisible, config_of, layout

from teratron.parallel.mesh import mesh_sizes
from teratron.parallel.schedules import SCHEDULES

pytestmark = pytest.mark.xdist_group("ranks")

DEEP: Keys = {"model.layers": 4}
MODERN: Keys = {"model.position": "rope", "model.norm": "rmsnorm", "model.activation": "swiglu", "model.kv_heads": 2, **DEEP}
UNTIED: Keys = {"model.tie_embeddings": False, **DEEP}
T5: Keys = {"model.family": "encoder_decoder", "model.kv_heads": 2}
DROPPING: Keys = {"model.attention_dropout": 0.3}
MOE: Keys = {"model.experts": 4, "model.expert_ffn": 12, "model.z_loss": 0.01, "model.capacity": 1.1, **DEEP}
LOSS_FREE: Keys = {"model.router": "sigmoid", "model.router_balance": "bias", "model.shared_experts": 1, **MOE}
FULL, SELECTIVE = {"train.recompute": "full"}, {"train.recompute": "selective"}
WHOLE, ODD, PACKED, SILENT = (False, 8), (False, 7), (True, 8), (False, 7, 4)


COMPOSITIONS: list[tuple[int, str, Keys, int, tuple[Any, ...]]] = [
    # ranks, layout, model, sequences of a micro-batch, batches
    (4, "pipeline 2 1f1b x tensor 2", DEEP, 2, WHOLE),
    (4, "pipeline 2 gpipe x tensor 2 x sequence", UNTIED, 1, ODD),
    (4, "pipeline 2 zb-h1 x tensor 2 x sequence", MODERN | FULL, 2, PACKED),
    (4, "pipeline 2 zbv x context 2 ring", MODERN | DROPPING, 2, PACKED),
    (4, "pipeline 2 interleaved x context 2 all_to_all", DEEP | SELECTIVE, 1, ODD),
    (4, "pipeline 2 dualpipev x context 2 ring", UNTIED | DROPPING, 1, WHOLE),
    (4, "pipeline 2 zb-h2 x shard optimizer", MODERN, 1, SILENT),
    (4, "pipeline 2 zb-h2 x tensor 2", UNTIED, 1, PACKED),
    (4, "pipeline 2 zbv x shard optimizer", DEEP | FULL, 1, PACKED),
    (4, "pipeline 2 dualpipev x shard optimizer", T5, 1, ODD),
    (4, "pipeline 2 1f1b x shard gradients", DEEP, 2, WHOLE),
    (4, "pipeline 2 1f1b x shard parameters", DEEP, 1, ODD),
    (4, "pipeline 2 gpipe x shard parameters", UNTIED | FULL, 2, WHOLE),
    (4, "pipeline 2 interleaved x shard parameters", MODERN, 1, PACKED),
    (4, "pipeline 2 gpipe x shard gradients", MODERN | DROPPING, 1, SILENT),
    (4, "pipeline 2 interleaved x shard gradients", T5, 2, WHOLE),
    (4, "context 2 ring x tensor 2 x sequence", MODERN | DROPPING | {"model.window": 3}, 0, ODD),
    (4, "context 2 all_to_all x shard parameters", MODERN | FULL, 2, PACKED),
    (4, "context 2 ring x shard optimizer", T5, 2, ODD),
    (4, "context 2 all_to_all x replicate 2", {"model.family": "encoder"} | DROPPING, 1, ODD),
    (6, "pipeline 3 1f1b x tensor 2", DEEP | {"parallel.split": "1,2,1"}, 2, ODD),
    (8, "pipeline 2 1f1b x tensor 2 x shard optimizer", DEEP, 2, WHOLE),
    (8, "pipeline 2 interleaved x tensor 2 x shard parameters", MODERN, 1, ODD),
    (8, "pipeline 2 zb-h1 x tensor 2 x sequence x shard optimizer", UNTIED, 1, PACKED),
    (8, "context 2 ring x tensor 2 x pipeline 2 1f1b", MODERN | DROPPING, 2, PACKED),
    (8, "context 2 all_to_all x tensor 2 x sequence x pipeline 2 zbv", MODERN, 2, WHOLE),
    (8, "context 2 ring x tensor 2 x pipeline 2 dualpipev", UNTIED | FULL, 1, ODD),
    (8, "pipeline 4 interleaved 2 x tensor 2", {"model.layers": 7}, 1, WHOLE),
    (8, "pipeline 4 zbv x context 2 ring", {"model.layers": 6} | DROPPING, 2, ODD),
    (8, "pipeline 2 gpipe x context 2 all_to_all x shard gradients", DEEP, 1, SILENT),
    (8, "pipeline 2 1f1b x context 2 ring x shard parameters", MODERN | SELECTIVE, 2, WHOLE),
    (8, "context 2 ring x tensor 2 x sequence x shard parameters", MODERN, 2, ODD),
    (8, "context 4 ring x shard gradients", DEEP | DROPPING, 1, PACKED),
    (8, "pipeline 2 interleaved x replicate 2 x shard parameters", UNTIED, 1, WHOLE),
    (8, "pipeline 4 dualpipev x replicate 2", T5 | {"model.layers": 3}, 1, PACKED),
    (8, "pipeline 2 1f1b x tensor 2 x sequence x context 2 ring", T5, 2, PACKED),
    (8, "expert 2 x tensor 2 x shard optimizer", MOE, 1, ODD),
    (8, "expert 4 x tensor 2 x sequence x pipeline 2 zbv", LOSS_FREE | DROPPING, 2, PACKED),
    (8, "expert 2 x context 2 ring x pipeline 2 1f1b x shard parameters", LOSS_FREE, 1, ODD),
]


@pytest.mark.parametrize(("ranks", "name", "model", "micro_batch", "shape"), COMPOSITIONS, ids=[case[1] for case in COMPOSITIONS])
def test_composition(ranks: int, name: str, model: Keys, micro_batch: int, shape: tuple[Any, ...]) -> None:
    assert_layout_invisible(ranks, model | layout(name) | {"train.micro_batch": micro_batch}, *shape)


def test_the_compositions_are_many_and_several_axes_each() -> None:
    sizes = [mesh_sizes(config_of(model | layout(name)).parallel, ranks) for ranks, name, model, *_ in COMPOSITIONS]
    composed = {name for (_, name, *_), size in zip(COMPOSITIONS, sizes, strict=True) if sum(degree > 1 for degree in size.values()) > 1}
    assert len(composed) == len(COMPOSITIONS) >= 25
    assert all(any(size[axis] > 1 for size in sizes) for axis in sizes[0])
    for schedule in SCHEDULES:
        assert any(schedule in name.split() and "tensor" in name for name in composed), f"{schedule} with tensor ranks"
        assert any(schedule in name.split() and "shard" in name for name in composed), f"{schedule} with sharding"
    assert sum(sum(degree > 1 for degree in size.values()) == 3 for size in sizes) >= 8
