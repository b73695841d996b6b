"""Applying a plan: every leaf has its row, the pieces of all ranks tile each part, and hold the single process's numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import assemble
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import place
from torch import Tensor, nn

from teratron.config import ModelConfig, OptimConfig, ParallelConfig, UserError
from teratron.models import FAMILIES, Part, build_model, initialise, load_parts, parts_of
from teratron.models.attention import AttentionCore
from teratron.models.latent import Spread
from teratron.models.leaves import Dropout, Leaf
from teratron.models.moe import Dispatch
from teratron.models.positions import Waves
from teratron.optim import build_optimizer
from teratron.parallel.apply import cut_model, cut_part, find_cut, materialise
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Group
from teratron.parallel.stages import Stages
from teratron.parallel.twins import ColumnLinear, RowLinear, VocabularyEmbedding, VocabularyHead, even_share

GPT2 = ModelConfig(layers=2, hidden=16, heads=4, seq_length=8, vocab_size=13, vocab_multiple=4)
LLAMA = dataclasses.replace(
    GPT2, kv_heads=2, ffn=24, norm="rmsnorm", activation="swiglu", position="rope", tie_embeddings=False, bias=False, qk_norm=True
)
MIXTURE = dataclasses.replace(LLAMA, experts=4, experts_per_token=2, shared_experts=1)
BERT = dataclasses.replace(GPT2, norm_place="post", token_types=2, embedding_norm=True, head_transform=True, pooler=True)
LATENT = dataclasses.replace(GPT2, position="rope", latent=6, latent_query=10, rope_dim=4)
RELATIVE = dataclasses.replace(GPT2, position="relative")
SANDWICHED = dataclasses.replace(GPT2, position="sinusoidal", norm_place="sandwich")
PLAIN: dict[str, Any] = {"latent": 0, "latent_query": 0, "rope_dim": 0}
LACKS: dict[str, dict[str, Any]] = {
    "encoder_decoder": PLAIN,
    "xlnet": {
        **{**PLAIN, "position": "transformer_xl", "kv_heads": 0, "qk_norm": False, "experts": 0, "shared_experts": 0},
        **{"token_types": 0, "pooler": False, "norm_place": "pre"},
    },
}
"""What a style lacks in a family, and has instead."""
UNCUT = {GPT2: {"positions"}, LLAMA: set(), BERT: {"positions", "types", "transform", "pooler", "sentence"}}
"""Matrices of each style that are small beside those of a block, and lie on every rank."""
SMALL = ("embedding.positions.weight", "bridge.embedding.positions.weight", "embedding.query.weight")
STYLES = pytest.mark.parametrize("style", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
FAMILY = pytest.mark.parametrize("family", FAMILIES)
QUICK = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config_of(style: ModelConfig, family: str) -> ModelConfig:
    return dataclasses.replace(style, family=family, **LACKS.get(family, {}))


def leaves_of(model: nn.Module) -> list[str]:
    kinds = (Leaf, Dropout, AttentionCore, Dispatch, Waves, Spread)
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


# Plans


@FAMILY
@STYLES
def test_every_leaf_has_exactly_one_row(style: ModelConfig, family: str) -> None:
    model = build_model(config_of(style, family), device="meta")
    for path in leaves_of(model):
        rows = [cut for pattern, cut in model.plan.items() if alike(pattern, path)]
        assert len(rows) == 1, (path, rows)
        assert find_cut(model.plan, path) is rows[0]


@FAMILY
def test_every_row_is_some_leafs(family: str) -> None:
    """In one of the styles; an attention to the memory has q and kv instead of qkv, and no norms of heads."""
    styles = [dataclasses.replace(style, predict_tokens=2) for style in (GPT2, LLAMA, MIXTURE, BERT, LATENT, SANDWICHED, RELATIVE)]
    styles.append(dataclasses.replace(GPT2, head="classes", classes=3))
    paths = {path for style in styles for path in leaves_of(build_model(config_of(style, family), device="meta"))}
    style = config_of(GPT2, family)
    paths |= {*leaves_of(build_model(style, range(1, FAMILIES[family].count_units(style)), "meta"))}  # without the owner of the table
    plan = FAMILIES[family].plan
    unused = {pattern for pattern in plan if not any(alike(pattern, path) for path in paths)}
    latent = {"q_down", "q_down_norm", "q_up", "kv_down", "kv_down_norm", "kv_up", "spread"}
    self_only, cross_only = {"qkv", "q_norm", "k_norm"} | latent, {"q", "kv"}
    either = {row for row in unused if row.rpartition(".")[2] in (self_only if ".cross_attention." in row else cross_only)}
    either |= {row for row in unused if row.rpartition(".")[2] in latent and family == "encoder_decoder"}
    assert unused == either


def alike(pattern: str, path: str) -> bool:
    """A row's path, part by part."""
    ours, theirs = pattern.split("."), path.split(".")
    return len(ours) == len(theirs) and all(a in ("*", b) for a, b in zip(ours, theirs, strict=True))


def test_a_leaf_without_a_row_is_a_defect() -> None:
    with pytest.raises(KeyError, match=r"no row for blocks\.0\.extra"):
        find_cut(FAMILIES["gpt"].plan, "blocks.0.extra")


@FAMILY
@STYLES
def test_every_matrix_is_cut_but_the_small_ones(style: ModelConfig, family: str) -> None:
    model = build_model(config_of(style, family), device="meta")
    leaves = [(path, module) for path, module in model.named_modules() if isinstance(module, Leaf)]
    kept = [path for path, leaf in leaves for part in leaf.parts() if len(part.shape) == 2 and not find_cut(model.plan, path).tensor]
    small = UNCUT[style] - {"positions", "types", "pooler", "sentence"} | {"query"} if family == "xlnet" else UNCUT[style]
    assert {path.rpartition(".")[2] for path in kept} == small


# One part


@given(st.integers(1, 50), st.integers(1, 12))
def test_even_shares_tile_and_differ_by_one_at_most(total: int, ranks: int) -> None:
    shares = [even_share(total, ranks, rank) for rank in range(ranks)]
    assert [n for share in shares for n in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def pieces_of(part: Part, dimension: int, ranks: int, granule: int, shareable: bool, even: bool) -> list[Part]:
    return [cut_part(part, dimension, Group(tuple(range(ranks)), rank), granule, shareable, even) for rank in range(ranks)]


def assert_tiled(part: Part, pieces: list[Part]) -> None:
    """Every element lies on as many ranks as its pieces say, neighbours; the first of them says so."""
    times, firsts = torch.zeros(part.shape), torch.zeros(part.shape)
    for rank, piece in enumerate(pieces):
        times[piece.box()] += 1 / piece.copies
        firsts[piece.box()] += piece.first
        begin = rank - rank % piece.copies
        assert all(other.box() == piece.box() for other in pieces[begin : begin + piece.copies])
        assert piece.first == (rank == begin)
        assert piece.shape == part.shape
        assert (piece.name, piece.std, piece.fill) == (part.name, part.std, part.fill)
    torch.testing.assert_close(times, torch.ones(part.shape))
    assert (firsts == 1).all()


@st.composite
def parts(draw: st.DrawFn, count: int, granule: int) -> tuple[Part, int]:
    """A part with count * granule elements along some dimension."""
    dimension = draw(st.integers(0, 1))
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    shape[dimension] = count * granule
    return Part("a", "weight", 0, tuple(shape), 0.1), dimension


@given(st.data(), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))
def test_pieces_of_even_parts_tile_them_in_whole_granules(data: st.DataObject, ranks: int, each: int, granule: int) -> None:
    part, dimension = data.draw(parts(ranks * each, granule))
    pieces = pieces_of(part, dimension, ranks, granule, False, even=True)
    assert_tiled(part, pieces)
    assert {piece.size[dimension] for piece in pieces} == {each * granule}
    assert {(piece.copies, piece.partial) for piece in pieces} == {(1, False)}


@given(st.data(), st.integers(1, 8), st.integers(0, 20))
def test_pieces_of_a_vocabulary_tile_it_however_it_divides(data: st.DataObject, ranks: int, more: int) -> None:
    part, dimension = data.draw(parts(ranks + more, 1))
    assert_tiled(part, pieces_of(part, dimension, ranks, 1, False, even=False))


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_fewer_heads_than_ranks_are_held_by_several(data: st.DataObject, heads: int, copies: int, granule: int) -> None:
    part, dimension = data.draw(parts(heads, granule))
    pieces = pieces_of(part, dimension, heads * copies, granule, True, even=True)
    assert_tiled(part, pieces)
    assert {(piece.copies, piece.partial, piece.size[dimension]) for piece in pieces} == {(copies, copies > 1, granule)}


@pytest.mark.parametrize(
    ("count", "ranks", "shareable", "even"), [(6, 4, False, True), (3, 4, False, False), (3, 2, True, True), (2, 4, False, True)]
)
def test_what_does_not_divide_is_refused(count: int, ranks: int, shareable: bool, even: bool) -> None:
    with pytest.raises(UserError, match=rf"^parallel\.tensor = {ranks}: a has {count} pieces along dimension 0: choose a divisor"):
        pieces_of(Part("a", "weight", 0, (count * 2, 3), 0.1), 0, ranks, 2, shareable, even)


# Whole models


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """A style, a family and a place for at most 12 ranks."""
    tensor, shard, replicate = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    changes = {"kv_heads": draw(st.sampled_from([1, 2, 4])), "tie_embeddings": draw(st.booleans()), "bias": draw(st.booleans())}
    style = dataclasses.replace(draw(st.sampled_from([GPT2, LLAMA])), **changes)
    return {
        "config": config_of(style, draw(st.sampled_from(list(FAMILIES)))),
        "sizes": {"replicate": replicate if tensor * shard < 7 else 1, "shard": shard, "tensor": tensor},
        "sequence": tensor > 1 and draw(st.booleans()),
        "sharded": draw(st.sampled_from(["optimizer", "parameters"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
    }


@given(layouts())
@QUICK
def test_any_layout_starts_from_the_single_processes_numbers(monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]) -> None:
    """Each rank draws its own slices (contract C8); put together they are the whole model, every element
    once; moments are zero, and every element counts once in the norm."""
    monkeypatch.setattr(FlatModel, "publish", lambda flat, **more: None)  # which sends
    config, sizes = layout["config"], layout["sizes"]
    pieces, counted = [], 0.0
    for rank in range(math.prod(sizes.values())):
        mesh = place(monkeypatch, rank, **sizes)
        flat = FlatModel(
            Stages({0: cut_model(config, mesh, layout["sequence"], layout["dtype"])}), mesh, ParallelConfig(shard=layout["sharded"])
        )
        optimizer = build_optimizer(flat, OptimConfig())
        optimizer.initialise(11)
        pieces += [piece for piece in optimizer.pieces() if piece.first]
        for bucket in flat.trained:
            for region, held in bucket.norm_ranges():
                assert 0 <= region.start < region.stop <= bucket.share
                counted += (region.stop - region.start) / (held * sizes["replicate"])
    found = assemble(pieces)
    whole = build_model(config)
    initialise(whole, 11)
    expected = values_of(whole)
    assert found.keys() == {f"{kind}/{name}" for kind in ("weight", "moment1", "moment2") for name in expected}
    for name, right in expected.items():
        assert torch.equal(found[f"weight/{name}"], right), name
        assert not found[f"moment1/{name}"].any()
    assert counted == pytest.approx(sum(values.numel() for values in expected.values()), rel=1e-12)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {part.name: part.of(parameters[part.parameter]).detach() for part in parts_of(model)}


@FAMILY
@STYLES
@pytest.mark.parametrize("tensor", [2, 4])
def test_a_cut_model_takes_its_pieces_of_whole_weights(
    monkeypatch: pytest.MonkeyPatch, style: ModelConfig, family: str, tensor: int
) -> None:
    config = config_of(style, family)
    whole = build_model(config)
    initialise(whole, 3)
    weights = values_of(whole)
    for rank in range(tensor):
        model = cut_model(config, place(monkeypatch, rank, tensor=tensor), True)
        materialise(model, "cpu")
        load_parts(model, weights)
        for part in parts_of(model):
            assert torch.equal(part.of(model.get_parameter(part.parameter)), weights[part.name][part.box()]), part.name


@FAMILY
@pytest.mark.parametrize("sequence", [False, True])
def test_a_rank_holds_its_share_and_the_twins_stand_in_the_leaves_places(
    monkeypatch: pytest.MonkeyPatch, family: str, sequence: bool
) -> None:
    config = config_of(dataclasses.replace(GPT2, vocab_size=16), family)
    whole, model = build_model(config, device="meta"), cut_model(config, place(monkeypatch, 1, tensor=4), sequence)
    assert leaves_of(model) == leaves_of(whole)
    matrices, everything = (
        [p.numel() for name, p in any_of.named_parameters() if p.dim() == 2 and name not in SMALL] for any_of in (model, whole)
    )
    assert [4 * count for count in matrices] == everything
    kinds = {type(module) for module in model.modules()}
    assert {ColumnLinear, RowLinear, VocabularyEmbedding, VocabularyHead} <= kinds
    assert model.head.output.weight is model.get_parameter("embedding.tokens.weight"), "tied as before"


def test_the_gradients_that_are_shares_are_those_behind_a_cut_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With sequence parallelism every norm of the residual stream and every bias added to it; without, what sees cut heads only."""
    config = config_of(dataclasses.replace(LLAMA, norm="layernorm", bias=True, position="learned", kv_heads=1), "gpt")
    heads = {f"blocks.{n}.attention.{name}.weight" for n in (0, 1) for name in ("q_norm", "k_norm")}
    shared = {f"blocks.{n}.attention.{name}.{kind}" for n in (0, 1) for name in "kv" for kind in ("weight", "bias")}
    norms = [f"blocks.{n}.{name}_norm" for n in (0, 1) for name in ("attention", "ffn")] + ["head.norm"]
    stream = {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")} | {"embedding.positions.weight"}
    stream |= {f"blocks.{n}.{name}.bias" for n in (0, 1) for name in ("attention.output", "ffn.down")}
    for sequence, expected in ((False, heads | shared), (True, heads | shared | stream)):
        model = cut_model(config, place(monkeypatch, 0, tensor=2), sequence)
        assert {part.name for part in parts_of(model) if part.partial} == expected


def test_a_single_tensor_rank_is_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cut_model(GPT2, place(monkeypatch, 1, shard=2))
    assert {type(module).__module__ for module in model.modules()} & {"teratron.parallel.twins"} == set()
