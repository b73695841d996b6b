"""The contrastive term compares all tokens of a document, wherever they are: every layout equals the single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_layout_invisible, config_of, layout, single
from pool import pool

from teratron.generate import ContrastiveSearch, ContrastiveStream, Decoder
from teratron.models import initialise
from teratron.parallel.apply import cut_model, materialise
from teratron.parallel.mesh import Mesh

pytestmark = pytest.mark.xdist_group("ranks")

CONTRAST = {"objective.contrastive": 0.7, "objective.margin": 0.6}
PACKED, ODD, SILENT = (True, 8, 0), (True, 7, 0), (False, 5, 4)
DEFAULT = [
    (4, "tensor 2 x sequence x context 2 ring", ODD, 2),
    (4, "pipeline 2 interleaved 2 x shard optimizer", PACKED, 1),
    (2, "context 2 all_to_all", SILENT, 0),
]
MORE = [
    (2, "tensor 2", PACKED, 2),
    (4, "tensor 4 x sequence", PACKED, 0),
    (4, "tensor 2 x sequence x context 2 all_to_all", SILENT, 1),
    (4, "context 4 ring", ODD, 0),
    (4, "pipeline 2 zbv 2 x context 2 ring", ODD, 2),
    (4, "pipeline 2 1f1b x tensor 2 x sequence", SILENT, 2),
    (8, "pipeline 2 1f1b x tensor 2 x sequence x context 2 ring", ODD, 2),
    (4, "shard parameters", PACKED, 1),
    (8, "shard gradients x context 2 ring x tensor 2 x sequence", PACKED, 1),
]


def keys_of(name: str, micro_batch: int) -> dict[str, Any]:
    stages = {"model.layers": 4} if "pipeline" in name else {}
    return {**CONTRAST, **stages, **layout(name), "train.micro_batch": micro_batch}


@pytest.mark.parametrize(
    ("ranks", "name", "shape", "micro_batch"), [*DEFAULT, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)], ids=str
)
def test_layouts_are_invisible(ranks: int, name: str, shape: tuple[bool, int, int], micro_batch: int) -> None:
    assert_layout_invisible(ranks, keys_of(name, micro_batch), *shape)


def test_the_term_changes_what_is_learnt() -> None:
    """Otherwise layouts would agree on nothing."""
    with_it, without = single(CONTRAST, *PACKED), single({}, *PACKED)
    assert all(a > b + 0.01 for a, b in zip(with_it.losses, without.losses, strict=True))
    assert any(not with_it.state[name].allclose(value, rtol=1e-3) for name, value in without.state.items())


def searched(rank: int, ranks: int) -> list[list[tuple[int, int]]]:
    """Steps of contrastive search by a model that is cut over tensor ranks."""
    mesh = Mesh({"tensor": ranks}, rank)
    model = cut_model(config_of({"model.seq_length": 24}).model, mesh, dtype=torch.float64)
    materialise(model, "cpu")
    initialise(model, 1)
    return list(ContrastiveStream(Decoder(model.eval(), [[1, 2, 3], [4]]), ContrastiveSearch(4, 0.4)))


def test_tensor_ranks_search_alike() -> None:
    expected = searched(0, 1)
    assert len({token for step in expected for _, token in step}) > 5
    assert pool().run(searched, 2) == [expected, expected]
