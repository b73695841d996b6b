"""The mesh: groups tile the world, every rank makes the same ones; degrees that do not divide are refused with those that do."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.config import ModelConfig, ParallelConfig, UserError
from teratron.parallel.mesh import AXES, DATA, Group, Mesh, check_layout, describe_layout, mesh_sizes

halves = st.integers(1, 2)
sizes = st.fixed_dictionaries(
    {"pipeline": halves, "replicate": st.integers(1, 3), "shard": halves, "context": halves, "tensor": st.sampled_from([1, 2, 4])}
)
QUICK = settings(deadline=None, max_examples=20)


def everyone(sizes: dict[str, int], neighbours: int = 1, places: Sequence[int] = (0,)) -> tuple[list[Mesh], list[list[tuple[int, ...]]]]:
    """The mesh of every rank, and the groups of several ranks that each asked torch for, in its order."""
    meshes, asked = [], []
    for rank in range(math.prod(sizes.values())):
        made: list[tuple[int, ...]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "new_group", lambda ranks, timeout, made=made: made.append(tuple(ranks)))
            meshes.append(Mesh(sizes, rank))
            meshes[-1].neighbours("tensor", neighbours)
            meshes[-1].another("pipeline")
            meshes[-1].among("pipeline", places)
        asked.append(made)
    return meshes, asked


@given(sizes)
@QUICK
def test_groups_along_any_axes_tile_the_world(sizes: dict[str, int]) -> None:
    meshes, _ = everyone(sizes)
    for axes in (*((axis,) for axis in AXES), DATA, AXES):
        found = {mesh.group(*axes).ranks for mesh in meshes}
        assert sorted(itertools.chain(*found)) == list(range(len(meshes)))
        assert {len(ranks) for ranks in found} == {math.prod(sizes[axis] for axis in axes)}
    for rank, mesh in enumerate(meshes):
        for group in (mesh.all, mesh.data, *(mesh.group(axis) for axis in AXES)):
            assert group.ranks[group.rank] == rank


@given(sizes, st.data())
@QUICK
def test_every_rank_makes_the_same_groups_in_the_same_order(sizes: dict[str, int], data: st.DataObject) -> None:
    """Or torch.distributed waits for ever."""
    count = data.draw(st.sampled_from([n for n in range(1, 5) if sizes["tensor"] % n == 0]))
    _, asked = everyone(sizes, count)
    assert all(made == asked[0] for made in asked)
    assert all(len(ranks) > 1 for ranks in asked[0])


@given(sizes)
@QUICK
def test_two_axes_cross_in_one_rank(sizes: dict[str, int]) -> None:
    meshes, _ = everyone(sizes)
    for mesh in meshes:
        for one, other in itertools.combinations(AXES, 2):
            assert set(mesh.group(one).ranks) & set(mesh.group(other).ranks) == {mesh.rank}


@given(sizes)
@QUICK
def test_tensor_ranks_are_neighbours_and_stages_and_copies_lie_furthest_apart(sizes: dict[str, int]) -> None:
    """The ranks that talk most share a machine."""
    meshes, _ = everyone(sizes)
    for mesh in meshes:
        first, last = mesh.tensor.ranks[0], mesh.tensor.ranks[-1]
        assert mesh.tensor.ranks == tuple(range(first, last + 1))
        apart = mesh.world // sizes["pipeline"]
        for axis, distance in (("pipeline", apart), ("replicate", apart // sizes["replicate"])):
            ranks = mesh.group(axis).ranks
            assert [b - a for a, b in itertools.pairwise(ranks)] == [distance] * (len(ranks) - 1)


def test_neighbours_are_runs_of_an_axis() -> None:
    meshes, _ = everyone({"replicate": 1, "shard": 2, "tensor": 4}, 2)
    assert [mesh.neighbours("tensor", 2).ranks for mesh in meshes] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2 + [(6, 7)] * 2
    assert [mesh.neighbours("tensor", 2).rank for mesh in meshes] == [0, 1] * 4


def test_ranks_at_some_places_of_an_axis_are_a_group_and_the_others_are_alone() -> None:
    meshes, asked = everyone({"pipeline": 4, "tensor": 2}, places=(0, 3))
    found = [mesh.among("pipeline", (0, 3)) for mesh in meshes]
    assert [group.ranks for group in found] == [(0, 6), (1, 7), (2,), (3,), (4,), (5,), (0, 6), (1, 7)]
    assert [group.rank for group in found] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert [mesh.among("pipeline", (2,)).ranks for mesh in meshes] == [(rank,) for rank in range(8)]
    assert all(made == asked[0] for made in asked)


def test_another_group_of_an_axis_has_a_communicator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout: object())
    mesh = Mesh({"pipeline": 2}, 1)
    assert mesh.group("pipeline").handle is None, "that of all ranks is there already"
    assert mesh.another("pipeline").handle is not None
    assert mesh.another("pipeline").ranks == mesh.group("pipeline").ranks == (0, 1)
    assert mesh.another("pipeline") is mesh.another("pipeline")


def test_a_single_process_needs_no_torch_distributed() -> None:
    mesh, x = Mesh(), torch.arange(4.0)
    assert (mesh.world, mesh.rank) == (1, 0)
    for group in (mesh.all, mesh.data, mesh.tensor, mesh.neighbours("tensor", 1), Group()):
        group.sum(x).wait()
        group.max(x).wait()
        out = torch.empty(4)
        group.gather(out, x).wait()
        assert torch.equal(out, x)
        out.zero_()
        group.scatter_sum(out, x).wait()
        assert torch.equal(out, x)
        assert torch.equal(x, torch.arange(4.0))
        assert group.gather_bytes(b"text") == [b"text"]


@pytest.mark.parametrize(
    ("keys", "world", "expected"),
    [
        ({}, 1, {}),
        ({}, 6, {"replicate": 6}),
        ({"tensor": 2}, 6, {"replicate": 3, "tensor": 2}),
        ({"tensor": 6}, 6, {"tensor": 6}),
        ({"shard": "optimizer"}, 6, {"shard": 6}),
        ({"shard": "parameters", "tensor": 2}, 8, {"shard": 4, "tensor": 2}),
        ({"shard": "gradients", "replicate": 2}, 8, {"replicate": 2, "shard": 4}),
        ({"shard": "gradients", "replicate": 2, "tensor": 2}, 8, {"replicate": 2, "shard": 2, "tensor": 2}),
        ({"shard": "gradients", "replicate": 8}, 8, {"replicate": 8}),
        ({"replicate": 4, "tensor": 2}, 8, {"replicate": 4, "tensor": 2}),
        ({"pipeline": 2, "context": 2}, 4, {"pipeline": 2, "context": 2}),
        ({"pipeline": 2, "context": 2, "tensor": 2}, 16, {"pipeline": 2, "replicate": 2, "context": 2, "tensor": 2}),
        ({"pipeline": 3, "context": 2, "shard": "optimizer"}, 12, {"pipeline": 3, "shard": 2, "context": 2}),
    ],
)
def test_the_shard_degree_is_what_is_left_of_the_world(keys: dict[str, object], world: int, expected: dict[str, int]) -> None:
    assert mesh_sizes(ParallelConfig(**keys), world) == dict.fromkeys(AXES, 1) | expected


def choices(error: UserError) -> list[int]:
    """The values that a refusal names at its end, such as 1, 2 or 4."""
    return [int(number) for number in re.findall(r"\d+", str(error).rpartition("choose ")[2])]


@pytest.mark.parametrize(
    ("keys", "world", "named", "nproc", "possible"),
    [
        ({"pipeline": 3}, 4, r"parallel\.pipeline = 3 does not divide the 4 processes", 6, [1, 2, 4]),
        ({"context": 3}, 4, r"parallel\.context = 3 does not divide the 4 processes", 6, [1, 2, 4]),
        ({"tensor": 4}, 6, r"parallel\.tensor = 4 does not divide the 6 processes", 8, [1, 2, 3, 6]),
        ({"tensor": 2}, 1, r"parallel\.tensor = 2 needs 2 processes, there is 1", 2, [1]),
        ({"tensor": 8}, 4, r"parallel\.tensor = 8 needs 8 processes, there are 4", 8, [1, 2, 4]),
        ({"pipeline": 2, "context": 2, "tensor": 2}, 12, r".* x .* x .* = 8 does not divide the 12 processes", 16, [1, 2, 3, 4, 6, 12]),
        ({"context": 2, "tensor": 4}, 4, r".* x .* = 8 needs 8 processes, there are 4", 8, [1, 2, 4]),
    ],
)
def test_degrees_that_do_not_divide_are_refused_with_those_that_do(
    keys: dict[str, int], world: int, named: str, nproc: int, possible: list[int]
) -> None:
    with pytest.raises(UserError, match=rf"^{named}: start --nproc {nproc} .*, or choose ") as error:
        mesh_sizes(ParallelConfig(**keys), world)
    assert all(f"parallel.{key} = {degree}" in str(error.value) for key, degree in keys.items())
    assert choices(error.value) == possible
    mesh_sizes(ParallelConfig(**keys), nproc)
    for choice in possible:
        mesh_sizes(ParallelConfig(**(dict.fromkeys(keys, 1) | {next(iter(keys)): choice})), world)


@pytest.mark.parametrize(
    ("keys", "world", "named", "possible"),
    [
        ({"shard": "optimizer", "replicate": 4}, 6, "replicate", [1, 2, 3, 6]),
        ({"shard": "optimizer", "replicate": 4, "tensor": 2}, 12, "replicate", [1, 2, 3, 6]),
        ({"expert": 3}, 4, "expert", [1, 2, 4]),
        ({"expert": 4, "tensor": 2}, 4, "expert", [1, 2]),
    ],
)
def test_what_does_not_divide_the_data_ranks_is_refused(keys: dict[str, object], world: int, named: str, possible: list[int]) -> None:
    with pytest.raises(UserError, match=rf"^parallel\.{named} = {keys[named]} does not divide .*: choose --parallel\.{named} ") as error:
        mesh_sizes(ParallelConfig(**keys), world)
    assert choices(error.value) == possible
    for choice in possible:
        assert math.prod(mesh_sizes(ParallelConfig(**{**keys, named: choice}), world).values()) == world


@pytest.mark.parametrize(("keys", "world"), [({"replicate": 2}, 6), ({"replicate": 4, "pipeline": 2, "context": 2}, 8)])
def test_copies_of_what_is_not_sharded_are_refused(keys: dict[str, int], world: int) -> None:
    """All are copies: there is nobody to be sharded over."""
    with pytest.raises(UserError, match=r"^parallel\.replicate = .* leave parallel\.replicate out, .*--parallel\.shard optimizer$"):
        mesh_sizes(ParallelConfig(**keys), world)
    mesh_sizes(ParallelConfig(**{**keys, "replicate": 0}), world)
    mesh_sizes(ParallelConfig(**{**keys, "replicate": 2, "shard": "optimizer"}), world)


MODEL = ModelConfig(layers=1, hidden=24, heads=12, kv_heads=4, ffn=96, seq_length=8, vocab_size=100)


@pytest.mark.parametrize(
    ("changes", "tensor", "possible"),
    [
        ({}, 5, "1, 2, 4, 12"),  # 3 and 6 ranks would tear 4 key/value heads apart, 12 have one of them to three
        ({}, 3, "1, 2, 4, 12"),
        ({}, 24, "1, 2, 4, 12"),
        ({"kv_heads": 12}, 5, "1, 2, 3, 4, 6, 12"),
        ({"kv_heads": 1}, 5, "1, 2, 3, 4, 6, 12"),
        ({"ffn": 90}, 4, "1, 2"),
        ({"vocab_size": 3}, 4, "1, 2"),
    ],
)
def test_tensor_degrees_that_the_model_cannot_be_cut_into_are_refused(changes: dict[str, int], tensor: int, possible: str) -> None:
    model = ModelConfig(**{**vars(MODEL), **changes})
    with pytest.raises(
        UserError, match=rf"^parallel\.tensor = {tensor} does not divide the model .*model\.heads = 12, .*: choose "
    ) as error:
        check_layout(model, ParallelConfig(tensor=tensor))
    assert choices(error.value) == list(map(int, possible.split(", ")))
    for choice in choices(error.value):
        check_layout(model, ParallelConfig(tensor=choice))


def test_what_is_proposed_suits_processes_and_model() -> None:
    """12 heads, 4 key/value heads, one layer, 12 experts."""
    model = replace(MODEL, experts=12)
    for keys, world, possible in (
        ({"tensor": 16}, 8, [1, 2, 4]),
        ({"tensor": 5}, 24, [1, 2, 4, 12]),
        ({"pipeline": 5}, 8, [1, 2]),
        ({"expert": 5}, 8, [1, 2, 4]),
    ):
        with pytest.raises(UserError) as error:
            mesh_sizes(ParallelConfig(**keys), world, model)
        assert choices(error.value) == possible
    for keys, world, possible in (
        ({"tensor": 8}, 8, [1, 2, 4]),
        ({"tensor": 8, "context": 3}, 72, [1, 2, 4, 12]),
        ({"expert": 8}, 8, [1, 2, 4]),
        ({"expert": 8, "tensor": 2}, 12, [1, 2, 3, 6]),
    ):
        with pytest.raises(UserError) as error:
            check_layout(model, ParallelConfig(**keys), world)
        assert choices(error.value) == possible


def test_a_layout_in_words() -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, pipeline=2, schedule="gpipe", shard="gradients", replicate=3, expert=2)
    words = "24 processes: pipeline 2 (gpipe) x replicate 3 x shard 2 (gradients) x tensor 2 (sequence), expert 2"
    assert describe_layout(mesh_sizes(parallel, 24), parallel) == words
    assert describe_layout(mesh_sizes(ParallelConfig(), 2), ParallelConfig()) == "2 processes: replicate 2"


def test_sequence_parallelism_needs_tensor_ranks() -> None:
    with pytest.raises(UserError, match=r"^parallel\.sequence = true needs parallel\.tensor of at least 2: "):
        check_layout(MODEL, ParallelConfig(sequence=True))
    check_layout(MODEL, ParallelConfig(sequence=True, tensor=2))


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2", "zbv", "dualpipev"])
@pytest.mark.parametrize("shard", ["gradients", "parameters"])
def test_put_off_weight_gradients_and_buffers_that_come_and_go_are_refused(schedule: str, shard: str) -> None:
    text = rf"^parallel\.schedule = {schedule} puts weight gradients off, .* parallel\.shard = {shard} .*: choose parallel\.shard optimizer"
    with pytest.raises(UserError, match=text):
        check_layout(MODEL, ParallelConfig(pipeline=2, schedule=schedule, shard=shard))
    for keys in ({"pipeline": 1, "shard": shard}, {"pipeline": 2, "shard": "optimizer"}):
        check_layout(MODEL, ParallelConfig(schedule=schedule, **keys))


@pytest.mark.parametrize(
    ("heads", "pairs", "tensor", "context", "possible"),
    [
        (12, 4, 1, 3, "1, 2, 4, 12"),  # three ranks would tear 4 key/value heads apart
        (12, 4, 1, 24, "1, 2, 4, 12"),
        (12, 4, 2, 4, "1, 2, 6"),
        (12, 12, 4, 2, "1, 3"),
        (12, 1, 2, 4, "1, 2, 3, 6"),
    ],
)
def test_too_few_heads_to_exchange_are_refused(heads: int, pairs: int, tensor: int, context: int, possible: str) -> None:
    model = ModelConfig(**{**vars(MODEL), "heads": heads, "kv_heads": pairs})
    layout = {"tensor": tensor, "context_method": "all_to_all"}
    text = rf"^parallel\.context = {context} does not divide the {heads // tensor} heads of a tensor rank, .*: choose --parallel.context "
    with pytest.raises(UserError, match=text) as error:
        check_layout(model, ParallelConfig(context=context, **layout))
    assert choices(error.value) == list(map(int, possible.split(", ")))
    for choice in choices(error.value):
        check_layout(model, ParallelConfig(context=choice, **layout))
    check_layout(model, ParallelConfig(context=context, tensor=tensor, context_method="ring"))
