"""Law 1 for mixtures of experts: every router and balance on every layout against the single process, in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from cases import Keys, assert_layout_invisible, config_of, layout
from pairwise import Row, cover

from teratron.parallel.mesh import DATA, Mesh, mesh_sizes
from teratron.train.engine import Engine

pytestmark = pytest.mark.xdist_group("ranks")

MOE: Keys = {"model.experts": 4, "model.expert_ffn": 12, "model.bias_rate": 0.01, "model.init_std": 0.5, "model.aux_loss": 0.05}
STYLES: dict[str, Keys] = {
    "softmax": {"model.activation": "swiglu", "model.experts_per_token": 1},
    "softmax-top2": {"model.normalise_gates": True},
    "sigmoid": {"model.router": "sigmoid", "model.gate_scale": 2.0, "model.experts_per_token": 3},
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "style": tuple(STYLES),
    "balance": ("aux", "bias", "none"),
    "capacity": (0.0, 0.6, 1.3),
    "shared": (0, 1),
    "z_loss": (0.0, 0.01),
    "blocks": ("every", "every 2nd", "behind a dense one"),
    "expert": (1, 2, 4),
    "pipeline": ("", "pipeline 2 1f1b", "pipeline 2 zb-h1", "pipeline 2 zbv"),
    "context": ("", "context 2 ring", "context 2 all_to_all"),
    "tensor": ("", "tensor 2", "tensor 2 x sequence"),
    "data": (1, 2, 4),
    "shard": ("none", "optimizer", "gradients", "parameters"),
    "copies": (1, 2),
    "micro_batch": (1, 2),
    "recompute": ("none", "full"),
    "rows": ("plain", "packed", "half of them silent"),
    "length": (8, 7),
}


def ranks_of(row: Row) -> int:
    return row["data"] * 2 ** sum(bool(row[axis]) for axis in ("pipeline", "context", "tensor"))


def allowed(row: Row) -> bool:
    """Layouts that a run is not refused for."""
    tokens = row["data"] * (2 if row["context"] else 1) * (2 if "sequence" in row["tensor"] else 1)
    return (
        tokens % row["expert"] == 0
        and row["data"] % row["copies"] == 0
        and (row["shard"] != "none" or row["copies"] == 1)
        and not ("z" in row["pipeline"] and row["shard"] in ("gradients", "parameters"))
    )


def keys_of(row: Row) -> Keys:
    """A row's config."""
    axes = layout(" x ".join(filter(None, (row["pipeline"], row["context"], row["tensor"]))))
    copies = {"parallel.replicate": row["copies"]} if row["shard"] != "none" else {}
    return {
        **MOE,
        **STYLES[row["style"]],
        **axes,
        **copies,
        "model.layers": 4 if row["pipeline"] else 2,
        "model.router_balance": row["balance"],
        "model.capacity": row["capacity"],
        "model.shared_experts": row["shared"],
        "model.z_loss": row["z_loss"],
        "model.moe_every": 2 if row["blocks"] == "every 2nd" else 1,
        "model.moe_first_dense": 1 if row["blocks"] == "behind a dense one" else 0,
        "parallel.expert": row["expert"],
        "parallel.shard": row["shard"],
        "train.micro_batch": row["micro_batch"],
        "train.recompute": row["recompute"],
    }


def shape_of(row: Row) -> tuple[bool, int, int]:
    """A row's batches: packed, length, silent rows."""
    return row["rows"] == "packed", row["length"], 4 if row["rows"] == "half of them silent" else 0


SMALL = cover(FACTORS, lambda row: 1 < ranks_of(row) <= 4 and allowed(row))
LARGE = cover(FACTORS, lambda row: ranks_of(row) == 8 and allowed(row))
ROWS = [*SMALL, *(pytest.param(row, marks=pytest.mark.slow) for row in LARGE)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_experts(row: Row) -> None:
    """Every two of the factors' values together."""
    assert_layout_invisible(ranks_of(row), keys_of(row), *shape_of(row))


def test_all_ranks_make_the_same_groups_where_only_one_stage_has_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router and its balance use groups that the ranks of the other stage have no need of, but must make with all."""
    keys = {**MOE, **layout(LATE), "model.layers": 4, "model.moe_first_dense": 2, "model.router_balance": "bias"}
    config, asked = config_of(keys), []
    for rank in range(8):
        made: list[tuple[int, ...]] = []
        monkeypatch.setattr(dist, "new_group", lambda ranks, timeout, made=made: made.append(tuple(ranks)))
        mesh = Mesh(mesh_sizes(config.parallel, 8), rank)
        Engine(config, mesh)
        at_start = len(made)
        for axes in ((*DATA, "context", "tensor"), (*DATA, "context", "pipeline")):  # of balance and of what is logged
            mesh.group(*axes)
        assert len(made) == at_start
        asked.append(made)
    assert all(made == asked[0] for made in asked)


LATE = "pipeline 2 1f1b x context 2 ring x tensor 2 x sequence"


@pytest.mark.slow
@pytest.mark.parametrize("name", [LATE, "pipeline 2 1f1b x tensor 2 x sequence"])
def test_experts_that_only_one_stage_has(name: str) -> None:
    keys = {**MOE, **layout(name), "model.layers": 4, "model.moe_first_dense": 2, "model.router_balance": "bias"}
    assert_layout_invisible(8, {**keys, "train.micro_batch": 1})
