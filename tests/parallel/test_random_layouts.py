"""Layouts, shapes and options drawn at random: whatever is not refused equals the single process."""

from __future__ import annotations

import pytest
from cases import Keys, assert_layout_invisible, config_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from teratron.config import UserError
from teratron.parallel.mesh import SPLIT, check_layout, mesh_sizes
from teratron.parallel.schedules import SCHEDULES

pytestmark = pytest.mark.xdist_group("ranks")

BATCH = 12


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def models(draw: st.DrawFn) -> Keys:
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
        **(draw(mixtures()) if draw(st.booleans()) else {}),
    }


@st.composite
def mixtures(draw: st.DrawFn) -> Keys:
    experts = draw(st.sampled_from([3, 4, 6]))
    return {
        "model.experts": experts,
        "model.experts_per_token": draw(st.integers(1, 3)),
        "model.expert_ffn": draw(st.integers(2, 9)),
        "model.router": draw(st.sampled_from(["softmax", "sigmoid"])),
        "model.router_balance": draw(st.sampled_from(["aux", "bias", "none"])),
        "model.capacity": draw(st.sampled_from([0.0, 0.7, 1.2])),
        "model.shared_experts": draw(st.integers(0, 1)),
        "model.z_loss": draw(st.sampled_from([0.0, 0.01])),
    }


@st.composite
def layouts(draw: st.DrawFn, model: Keys) -> tuple[int, Keys]:
    """Ranks, eight at most, and the keys that lay a model over them, its layers as many as the stages need."""
    tensor = draw(st.sampled_from([n for n in divisors(model["model.heads"]) if n <= 8]))
    pipeline = draw(st.sampled_from([n for n in (1, 1, 2, 3) if n <= 8 // tensor]))
    context = draw(st.sampled_from([n for n in (1, 1, 2, 3) if n <= 8 // (tensor * pipeline)]))
    inner = tensor * pipeline * context
    data = draw(st.sampled_from([n for n in divisors(BATCH) if (inner == 1) < n <= 8 // inner] or [1]))
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    chunks = SCHEDULES[schedule].least_chunks
    late = pipeline > 1 and schedule in SPLIT
    shard = draw(st.sampled_from(["none", "optimizer"] if late else ["none", "optimizer", "gradients", "parameters"]))
    sequence = tensor > 1 and draw(st.booleans())
    tokens = data * context * (tensor if sequence else 1)
    keys: Keys = {
        "model.layers": max(model["model.layers"], pipeline * chunks if pipeline > 1 else 1),
        "parallel.tensor": tensor,
        "parallel.sequence": sequence,
        "parallel.pipeline": pipeline,
        "parallel.schedule": schedule,
        "parallel.context": context,
        "parallel.context_method": draw(st.sampled_from(["ring", "all_to_all"])),
        "parallel.expert": draw(st.sampled_from([n for n in divisors(model.get("model.experts", 1)) if tokens % n == 0])),
        "parallel.shard": shard,
        "train.micro_batch": draw(st.sampled_from([0, *divisors(BATCH // data)])),
    }
    if shard != "none":
        keys["parallel.replicate"] = draw(st.sampled_from(divisors(data)))
    return inner * data, keys


@st.composite
def trainings(draw: st.DrawFn) -> tuple[int, Keys, tuple[int, ...]]:
    model = draw(models())
    ranks, layout = draw(layouts(model))
    options = {
        "train.global_batch": BATCH,
        "train.recompute": draw(st.sampled_from(["none", "selective", "full"])),
        "objective.label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    return ranks, model | layout | options, (draw(st.booleans()), draw(st.integers(2, 8)), draw(st.integers(0, BATCH - 1)))


def is_refused(ranks: int, keys: Keys) -> bool:
    config = config_of(keys)
    try:
        mesh_sizes(config.parallel, ranks)
        check_layout(config.model, config.parallel)
    except UserError:
        return True
    return False


DRAWN = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
"""Without shrinking: a rank that has failed ends the whole pool."""


@settings(max_examples=8, **DRAWN)
@given(trainings())
def test_any_layout_is_invisible(drawn: tuple[int, Keys, tuple[int, ...]]) -> None:
    assert_invisible(drawn)


@pytest.mark.slow
@settings(max_examples=60, **DRAWN)
@given(trainings())
def test_many_layouts_are_invisible(drawn: tuple[int, Keys, tuple[int, ...]]) -> None:
    assert_invisible(drawn)


def assert_invisible(drawn: tuple[int, Keys, tuple[int, ...]]) -> None:
    ranks, keys, shape = drawn
    if is_refused(ranks, keys):  # only heads that neither divide the ranks nor are divided by them, and odd shared experts
        pairs, tensor = keys["model.kv_heads"], keys["parallel.tensor"]
        uneven = pairs % tensor and tensor % pairs
        uneven = uneven or keys.get("model.shared_experts", 0) * keys.get("model.expert_ffn", 0) % tensor
        assert uneven or (keys["parallel.context"] > 1 and keys["parallel.context_method"] == "all_to_all")
    else:
        assert_layout_invisible(ranks, keys, *shape)
