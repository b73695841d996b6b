"""Layouts, shapes and options drawn at random: whatever is not refused equals the single process."""

from __future__ import annotations

from typing import Any

import pytest
from cases import assert_layout_invisible, config_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teratron.config import UserError
from teratron.parallel.mesh import check_layout, mesh_sizes

pytestmark = pytest.mark.xdist_group("ranks")

BATCH = 12


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([2, 3, 4, 6, 8]))
    family = draw(st.sampled_from(["gpt", "gpt", "encoder", "encoder_decoder"]))
    return {
        "model.family": family,
        "model.layers": draw(st.integers(1, 1 if family == "encoder_decoder" else 3)),
        "model.heads": heads,
        "model.kv_heads": draw(st.sampled_from(divisors(heads))),
        "model.hidden": draw(st.integers(3, 17)),
        "model.head_dim": draw(st.sampled_from([2, 4])),
        "model.ffn": heads * draw(st.integers(1, 3)),
        "model.vocab_size": draw(st.integers(8, 29)),
        "model.vocab_multiple": draw(st.sampled_from([1, 3, 8])),
        "model.norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "model.activation": draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu", "geglu"])),
        "model.position": draw(st.sampled_from(["learned", "rope", "none"])),
        **{f"model.{name}": draw(st.booleans()) for name in ("tie_embeddings", "bias", "qk_norm")},
        "model.dropout": draw(st.sampled_from([0.0, 0.3])),
        "model.attention_dropout": draw(st.sampled_from([0.0, 0.3])),
    }


@st.composite
def layouts(draw: st.DrawFn, heads: int) -> tuple[int, dict[str, Any]]:
    """Ranks, and the keys that lay a model with so many heads over them."""
    tensor = draw(st.sampled_from([n for n in divisors(heads) if n <= 8]))
    data = draw(st.sampled_from([n for n in divisors(BATCH) if (tensor == 1) < n <= 8 // tensor] or [1]))
    shard = draw(st.sampled_from(["none", "optimizer", "gradients", "parameters"]))
    keys = {"parallel.tensor": tensor, "parallel.shard": shard, "parallel.sequence": tensor > 1 and draw(st.booleans())}
    if shard != "none":
        keys["parallel.replicate"] = draw(st.sampled_from(divisors(data)))
    return tensor * data, keys | {"train.micro_batch": draw(st.sampled_from([0, *divisors(BATCH // data)]))}


@st.composite
def trainings(draw: st.DrawFn) -> tuple[int, dict[str, Any], tuple[int, ...]]:
    model = draw(models())
    ranks, layout = draw(layouts(model["model.heads"]))
    options = {
        "train.global_batch": BATCH,
        "train.recompute": draw(st.sampled_from(["none", "selective", "full"])),
        "objective.label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    return ranks, model | layout | options, (draw(st.booleans()), draw(st.integers(2, 8)), draw(st.integers(0, BATCH - 1)))


def is_refused(ranks: int, keys: dict[str, Any]) -> bool:
    config = config_of(keys)
    try:
        mesh_sizes(config.parallel, ranks)
        check_layout(config.model, config.parallel)
    except UserError:
        return True
    return False


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(trainings())
def test_any_layout_is_invisible(drawn: tuple[int, dict[str, Any], tuple[int, ...]]) -> None:
    ranks, keys, shape = drawn
    if is_refused(ranks, keys):  # only key/value heads that neither divide the ranks nor are divided by them
        pairs, tensor = keys["model.kv_heads"], keys["parallel.tensor"]
        assert pairs % tensor
        assert tensor % pairs
    else:
        assert_layout_invisible(ranks, keys, *shape)
