"""Law 1: layout is never visible. Every layout, family and option against the single process, in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest
from cases import assert_layout_invisible
from pairwise import Row, cover, pairs

from teratron.parallel.schedules import SCHEDULES

pytestmark = pytest.mark.xdist_group("ranks")

MODERN = {"model.position": "rope", "model.norm": "rmsnorm", "model.activation": "swiglu", "model.bias": False, "model.qk_norm": True}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied": {"model.tie_embeddings": False, "model.vocab_multiple": 1},
    "modern": MODERN | {"model.kv_heads": 2, "model.tie_embeddings": False},
    "modern-one-kv": MODERN | {"model.kv_heads": 1},
    "encoder": {"model.family": "encoder"},
    "t5": {"model.family": "encoder_decoder", "model.layers": 1, "model.kv_heads": 2, "model.vocab_multiple": 1},
    "t5-untied": {"model.family": "encoder_decoder", "model.layers": 1, "model.tie_embeddings": False},
}
TENSOR = {"parallel.tensor": 2}
SEQUENCE = {"parallel.sequence": True}
ALONE: dict[str, dict[str, Any]] = {
    "replicate": {},
    "tensor": {},  # as many as ranks
    "sequence": SEQUENCE,
    **{shard: {"parallel.shard": shard} for shard in ("optimizer", "gradients", "parameters")},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ALONE)
def test_each_parallelism_alone(kind: str, ranks: int) -> None:
    assert_layout_invisible(ranks, ALONE[kind] | ({"parallel.tensor": ranks} if kind in ("tensor", "sequence") else {}))


FACTORS: dict[str, tuple[Any, ...]] = {
    "model": tuple(MODELS),
    "tensor": (1, 2, 4),
    "sequence": (False, True),
    "data": (1, 2, 4, 8),
    "shard": ("none", "optimizer", "gradients", "parameters"),
    "copies": (1, 2),
    "dropout": ("", "residual", "attention too"),
    "micro_batch": (0, 1, 2),
    "recompute": ("none", "selective", "full", "every 2nd"),
    "smoothing": (0.0, 0.2),
    "rows": ("plain", "packed", "half of them silent"),
    "length": (8, 7, 5),
}


def allowed(row: Row) -> bool:
    """Layouts of two to eight ranks that a run is not refused for."""
    shards = row["data"] // row["copies"]
    return (
        1 < row["tensor"] * row["data"] <= 8
        and (row["tensor"] > 1 or not row["sequence"])
        and ((row["shard"] != "none" and shards > 1) or (row["shard"] == "none" and row["copies"] == 1))
        and 8 % (row["data"] * max(row["micro_batch"], 1)) == 0
    )


def keys_of(row: Row) -> dict[str, Any]:
    """A row's config."""
    keys: dict[str, Any] = {"parallel.tensor": row["tensor"], "parallel.sequence": row["sequence"], "parallel.shard": row["shard"]}
    if row["shard"] != "none":
        keys["parallel.replicate"] = row["copies"]
    every = 2 if row["recompute"] == "every 2nd" else 1
    return keys | {
        **MODELS[row["model"]],
        "model.dropout": 0.2 if row["dropout"] else 0.0,
        "model.attention_dropout": 0.3 if row["dropout"] == "attention too" else 0.0,
        "objective.label_smoothing": row["smoothing"],
        "train.micro_batch": row["micro_batch"],
        "train.recompute": "full" if every == 2 else row["recompute"],
        "train.recompute_every": every,
    }


ROWS = cover(FACTORS, allowed)


def name_of(row: Row) -> str:
    return "-".join(map(str, row.values()))


def shape_of(row: Row) -> tuple[bool, int, int]:
    """A row's batches: packed, length, silent rows."""
    return row["rows"] == "packed", row["length"], 4 if row["rows"] == "half of them silent" else 0


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_compositions(row: Row) -> None:
    """Every two of the factors' values together."""
    assert_layout_invisible(row["tensor"] * row["data"], keys_of(row), *shape_of(row))


# Pipelines

STAGED = {"gpt2", "gpt2-untied", "modern", "encoder", "t5", "t5-untied"}
PIPELINES: dict[str, tuple[Any, ...]] = {
    "schedule": tuple(SCHEDULES),
    "ranks": (2, 4),
    "chunks": (1, 2, 3),
    "split": ("even", "by hand"),
    "micro_batch": (0, 1, 2, 4),  # 1, 8, 4 and 2 micro-batches: fewer and more than ranks
    "model": tuple(sorted(STAGED)),
    "dropout": FACTORS["dropout"],
    "recompute": FACTORS["recompute"],
    "rows": FACTORS["rows"],
    "length": (8, 5),
}


def pipeline_allowed(row: Row) -> bool:
    """Whether the schedule can have so many chunks; eight stages are enough."""
    return SCHEDULES[row["schedule"]].allows(row["chunks"]) and row["ranks"] * row["chunks"] <= 8


def pipeline_keys(row: Row) -> dict[str, Any]:
    stages, seq2seq = row["ranks"] * row["chunks"], row["model"].startswith("t5")
    inner = max(stages + 1, 4)  # units between the embedding and the head: layers, or twice as many and a bridge
    layers = inner // 2 if seq2seq else inner
    inner = 2 * layers + 1 if seq2seq else layers
    by_hand = [0, *[1] * (stages - 2), inner - stages + 2]
    return {
        **keys_of({"tensor": 1, "sequence": False, "shard": "none", "smoothing": 0.0} | row),
        "model.layers": layers,
        "parallel.pipeline": row["ranks"],
        "parallel.schedule": row["schedule"],
        "parallel.chunks": row["chunks"],
        "parallel.split": ",".join(map(str, by_hand)) if row["split"] == "by hand" else "",
    }


PIPELINE_ROWS = cover(PIPELINES, pipeline_allowed)


@pytest.mark.parametrize("row", PIPELINE_ROWS, ids=name_of)
def test_pipelines(row: Row) -> None:
    assert_layout_invisible(row["ranks"], pipeline_keys(row), *shape_of(row))


# Long sequences

CONTEXTS: dict[str, tuple[Any, ...]] = {
    "method": ("ring", "all_to_all"),
    "ranks": (2, 4),
    "pairs": (4, 2, 1),  # of keys and values, to 4 heads of queries
    "model": ("gpt2", "modern", "encoder", "t5"),
    "window": (0, 3),
    "dropout": FACTORS["dropout"],
    "recompute": FACTORS["recompute"],
    "rows": FACTORS["rows"],
    "length": (16, 8, 7, 5, 1),
    "micro_batch": (0, 2),
}


def context_allowed(row: Row) -> bool:
    """Encoders have no window; one token is one document."""
    return (not row["window"] or row["model"] in ("gpt2", "modern")) and (row["rows"] != "packed" or row["length"] > 1)


def context_keys(row: Row) -> dict[str, Any]:
    return {
        **keys_of({"tensor": 1, "sequence": False, "shard": "none", "smoothing": 0.0} | row),
        "model.seq_length": 16,
        "model.kv_heads": row["pairs"],
        "model.window": row["window"],
        "parallel.context": row["ranks"],
        "parallel.context_method": row["method"],
    }


CONTEXT_ROWS = cover(CONTEXTS, context_allowed)


@pytest.mark.parametrize("row", CONTEXT_ROWS, ids=name_of)
def test_contexts(row: Row) -> None:
    assert_layout_invisible(row["ranks"], context_keys(row), *shape_of(row))


def test_the_compositions_are_what_they_should_be() -> None:
    together = set().union(*map(pairs, ROWS))
    assert (("tensor", 4), ("shard", "parameters")) in together
    assert (("sequence", True), ("copies", 2)) in together
    assert (("model", "t5"), ("recompute", "every 2nd")) in together
    assert sum(row["tensor"] * row["data"] == 8 for row in ROWS) >= 5
    assert {row["schedule"] for row in PIPELINE_ROWS} == set(SCHEDULES)
    together = set().union(*map(pairs, PIPELINE_ROWS))
    assert {(("schedule", schedule), ("ranks", ranks)) for schedule in SCHEDULES for ranks in (2, 4)} <= together
    together = set().union(*map(pairs, CONTEXT_ROWS))
    assert {(("method", method), ("rows", "packed")) for method in CONTEXTS["method"]} <= together
    assert (("window", 3), ("dropout", "attention too")) in together
    assert any(row["tensor"] == 2 and row["data"] == 4 and row["copies"] == 2 and row["sequence"] for row in ROWS)
