"""A layout on paper: the ranks of the real mesh, what a real cut holds, and what a whole simulation says."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from teratron.config import Config, UserError
from teratron.parallel.mesh import Mesh
from teratron.parallel.schedules import SCHEDULES, build_schedule
from teratron.parallel.simulate import peak_activations, simulate
from teratron.plan.layout import Layout, PaperMesh, lay_out, least_world
from teratron.plan.layout_svg import layout_svg
from teratron.plan.layout_text import elided, layout_text

SIZES = {"pipeline": 2, "replicate": 3, "shard": 2, "context": 2, "tensor": 4}
SVG = "{http://www.w3.org/2000/svg}"


def laid(world: int = 0, **keys: object) -> Layout:
    """A small model, whose vocabulary divides by nothing."""
    small = {"model.layers": 6, "model.hidden": 32, "model.heads": 4, "model.vocab_size": 101, "model.seq_length": 16}
    batch = {"train.global_batch": 24, "train.micro_batch": 1}
    config = Config().override({**small, **batch, **{name.replace("__", "."): value for name, value in keys.items()}})
    return lay_out(config, world or least_world(config.parallel))


def test_groups_on_paper_are_those_of_the_mesh() -> None:
    """Of every rank and every kind of group."""
    whole = Mesh()
    whole.sizes = SIZES
    for rank in range(math.prod(SIZES.values())):
        paper = PaperMesh(SIZES, rank)
        for axes in [("tensor",), ("context",), ("pipeline",), ("replicate", "shard"), ("shard", "context"), tuple(SIZES)]:
            (mine,) = [line for line in whole._lines(axes) if rank in line]
            assert paper.group(*axes).ranks == tuple(mine)
            assert paper.group(*axes).ranks[paper.group(*axes).rank] == rank
        assert rank in paper.neighbours("tensor", 2).ranks
        assert paper.among("pipeline", [0, 1]).ranks == paper.group("pipeline").ranks


def test_every_rank_stands_in_one_cell() -> None:
    layout = laid(96, parallel__pipeline=2, parallel__replicate=3, parallel__shard="optimizer", parallel__context=2, parallel__tensor=4)
    assert layout.sizes == SIZES
    found = [rank for pipeline in range(2) for place in range(len(layout.places)) for rank in layout.ranks(pipeline, place)]
    assert found == list(range(96))
    for place, at in enumerate(layout.places):
        mesh = PaperMesh(SIZES, layout.ranks(1, place)[0])
        assert list(mesh.group("tensor").ranks) == list(layout.ranks(1, place))
        assert at == {axis: mesh.group(axis).rank for axis in ("replicate", "shard", "context")}


@pytest.mark.parametrize(("sequence", "degree"), [(False, 2), (False, 6), (True, 2), (True, 3), (True, 12)])
def test_the_experts_on_paper_are_those_of_the_mesh(sequence: bool, degree: int) -> None:
    keys = {"parallel__pipeline": 2, "parallel__context": 2, "parallel__tensor": 4, "parallel__sequence": sequence}
    layout = laid(48, **keys, model__experts=12, parallel__expert=degree)
    for place in range(len(layout.places)):
        held = layout.experts(place)
        for tensor, rank in enumerate(layout.ranks(1, place)):
            share = PaperMesh(layout.sizes, rank).experts(degree, sequence).rank
            assert held[tensor if sequence else 0] == range(share * 12 // degree, (share + 1) * 12 // degree)
    text, svg = layout_text(layout, 160), layout_svg(layout, "experts")
    first = "experts " + {
        (False, 2): "0-5",
        (False, 6): "0-1",
        (True, 2): "0-5 | 6-11 | 0-5 | 6-11",
        (True, 3): "0-3 | 4-7 | 8-11 | 0-3",
    }.get((sequence, degree), "0 | 1 | 2 | 3")
    assert first in text
    assert first in svg
    assert f"{12 // degree} of 12 experts" in text


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipev"])
def test_the_ranks_of_a_pipeline_hold_the_model_once(schedule: str) -> None:
    """But for the table of tied embeddings, which first and last stage hold."""
    whole, cut = laid(), laid(parallel__pipeline=2, parallel__schedule=schedule)
    names = [name for share in cut.shares for name in share.parts]
    assert sorted(set(names)) == sorted(whole.shares[0].parts)
    ranks = len({rank for rank, stages in enumerate(cut.held) for stage in (0, len(cut.units) - 1) if stage in stages})
    assert sum(share.parameters for share in cut.shares) == whole.shares[0].parameters + (ranks - 1) * 101 * 32


@pytest.mark.parametrize(("precision", "shard", "each"), [
    ("fp32", "none", 16), ("bf16", "none", 20), ("bf16", "optimizer", 8 + 12 / 4), ("bf16", "parameters", 18 / 4),
])  # fmt: skip
def test_state_is_what_the_docs_say_a_parameter_takes(precision: str, shard: str, each: float) -> None:
    """Up to the padding of the vocabulary and of slices; the tied table keeps its gradient, as several units add to it."""
    layout = laid(4, model__vocab_size=128, model__hidden=128, train__precision=precision, parallel__shard=shard)
    table = 128 * 128 * (6 if shard == "parameters" else 0)
    assert layout.shares[0].state == pytest.approx(each * layout.shares[0].parameters + table, rel=0.02)


@example("interleaved", 2, 11, "none").via("few ranks need several rounds to fill")
@example("interleaved", 5, 91, "full").via("the last round is not whole")
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 6), st.integers(1, 110), st.sampled_from(["none", "full"]))
@settings(max_examples=25, deadline=None)
def test_bubble_and_peak_are_those_of_the_whole_step(schedule: str, ranks: int, batches: int, recompute: str) -> None:
    layout = laid(
        parallel__pipeline=ranks, parallel__schedule=schedule, model__layers=12, train__global_batch=batches, train__recompute=recompute
    )
    made, costs = build_schedule(schedule, ranks, batches, SCHEDULES[schedule].least_chunks), layout.stage_costs
    whole = simulate(made, costs, [cost * (2 if recompute == "full" else 1) for cost in costs], costs)
    assert layout.pipeline is not None
    assert layout.pipeline.bubble == pytest.approx(whole.bubble, abs=1e-6)
    assert layout.pipeline.peak == pytest.approx(max(peak_activations(made)))


def test_costs_count_layers_and_the_head() -> None:
    layout = laid(parallel__pipeline=2, parallel__split="4,2")
    assert layout.stage_costs == [4.0, 2 + 101 / (12 * 32)]


@given(
    st.sampled_from([1, 2, 3, 7]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 3, 24]),
    st.sampled_from(["none", "optimizer"]), st.sampled_from(sorted(SCHEDULES)),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_picture_fits_its_page(pipeline: int, tensor: int, context: int, data: int, shard: str, schedule: str) -> None:
    keys = {"parallel__pipeline": pipeline, "parallel__tensor": tensor, "parallel__context": context, "parallel__shard": shard}
    layout = laid(pipeline * tensor * context * data, **keys, parallel__schedule=schedule, model__layers=14)
    text = layout_text(layout)
    assert max(map(len, text.splitlines())) <= 100
    assert f"pipeline {pipeline} x" in text
    root = ElementTree.fromstring(layout_svg(layout, "a <name>"))
    width = float(root.attrib["width"])
    outer = [*root.findall(f"{SVG}rect"), *root.findall(f"{SVG}text")]
    assert all(0 <= float(one.attrib.get("x", 0)) <= width for one in outer)
    assert all(float(one.attrib.get("x", 0)) + float(one.attrib["width"]) <= width for one in root.findall(f"{SVG}rect"))
    numbers = [one.text or "" for one in root.findall(f"{SVG}text") if one.attrib.get("class") == "number"]
    drawn = [rank for words in numbers if words[0].isdigit() for rank in _between(words)]
    assert len(set(drawn)) == len(drawn), "no rank twice"
    assert {0, layout.world - 1} <= set(drawn)
    if data == 1:
        assert sorted(drawn) == list(range(layout.world))


def _between(words: str) -> range:
    first, _, last = words.partition("-")
    return range(int(first), int(last or first) + 1)


def test_thousands_of_ranks_are_elided() -> None:
    layout = laid(4096, parallel__tensor=4, train__global_batch=1024)
    text = layout_text(layout)
    assert re.search(r"^0 .* 0 1 2 3 .*\.\.\. .*4092 4093 4094 4095$", text, re.MULTILINE)
    assert elided(1000, 4) == [0, 1, None, 999]
    assert elided(4, 4) == [0, 1, 2, 3]


def test_one_micro_batch_is_told() -> None:
    assert "--train.micro_batch 1 makes 24" in layout_text(laid(parallel__pipeline=2, train__micro_batch=0))
    assert "--train.micro_batch" not in layout_text(laid(parallel__pipeline=2))


@pytest.mark.parametrize(("keys", "world", "message"), [
    ({"parallel__tensor": 3}, 3, "parallel.tensor = 3 does not divide the model"),
    ({"parallel__tensor": 2}, 3, "does not divide the 3 processes"),
    ({}, -1, "--world -1"),
    ({"parallel__pipeline": 9}, 9, "too few for 9 pipeline stages"),
])  # fmt: skip
def test_what_a_run_would_refuse_is_refused(keys: dict[str, object], world: int, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        laid(world, **keys)
