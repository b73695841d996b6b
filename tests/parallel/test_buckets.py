"""Flat buckets: parameters and gradients are views of them, shared parameters once, no value changes on the way in; what a slice holds."""

from __future__ import annotations

import math

import pytest
import torch
from places import place
from torch import Tensor, nn

from teratron.config import ModelConfig, OptimConfig, ParallelConfig
from teratron.models import Model, Part, build_model, initialise, parts_of
from teratron.optim import build_optimizer, global_norm
from teratron.parallel.buckets import Bucket, Sharding, is_released, release, restore
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Group, Mesh
from teratron.parallel.offload import Home
from teratron.parallel.stages import Stages

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, seq_length=8, vocab_size=30)
STATE = {"tokens": torch.arange(8)[None], "positions": torch.arange(8)[None]}
STAGE = "models.0."
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def made(dtype: torch.dtype = torch.float32, family: str = "gpt") -> Model:
    model = build_model(ModelConfig(**{**vars(CONFIG), "family": family}), dtype=dtype)
    initialise(model, 1)
    return model


def flat_of(model: Model) -> FlatModel:
    return FlatModel(Stages({0: model}), Mesh(), ParallelConfig())


def names_in(bucket: Bucket) -> set[str]:
    """Its parameters, by their names in the one stage's model."""
    return {name.removeprefix(STAGE) for name in bucket.places}


def view(bucket: Bucket, flat: Tensor, name: str) -> Tensor:
    start, shape = bucket.places[STAGE + name]
    return flat[start : start + math.prod(shape)].view(shape)


@pytest.mark.parametrize("family", ["gpt", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_and_gradients_become_views_with_the_same_values(dtype: torch.dtype, family: str) -> None:
    model = made(dtype, family)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buckets = flat_of(model).buckets
    assert sum(bucket.weights.numel() for bucket in buckets) == sum(values.numel() for values in before.values())
    seen = []
    for bucket in buckets:
        for name in names_in(bucket):
            parameter = model.get_parameter(name)
            assert torch.equal(parameter, before[name])
            assert parameter.data_ptr() == view(bucket, bucket.weights, name).data_ptr()
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == view(bucket, bucket.backward, name).data_ptr()
            seen.append(name)
        matrices = [model.get_parameter(name).dim() > 1 for name in sorted(names_in(bucket), key=lambda n: bucket.places[STAGE + n][0])]
        assert matrices == sorted(matrices, reverse=True), "parts that decay lie side by side"
        bucket.weights.fill_(3.0)
    assert sorted(seen) == sorted(before)
    assert all((parameter == 3).all() for parameter in model.parameters())


def test_a_unit_has_a_bucket() -> None:
    flat = flat_of(made())
    units = [{name.split(".")[0] for name in names_in(bucket)} for bucket in flat.buckets]
    assert units == [{"embedding"}, {"blocks"}, {"blocks"}, {"head"}]
    assert [{name.split(".")[1] for name in names_in(bucket)} for bucket in flat.buckets[1:3]] == [{"0"}, {"1"}]


def test_backward_adds_into_the_buffer_and_the_norm_is_that_of_all_gradients() -> None:
    model = made(torch.float64)
    flat, norms = flat_of(model), []
    for _ in range(2):
        flat.backward(0, [model(STATE)["hidden"].sin().sum()], [None], last=True)
        flat.finish()
        gradients = []
        for bucket in flat.buckets:
            for name in names_in(bucket):
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                assert gradient.data_ptr() == view(bucket, bucket.gradient, name).data_ptr()
                gradients.append(gradient.flatten())
        norms.append(float(torch.cat(gradients).norm()))
        assert float(global_norm(flat)) == pytest.approx(norms[-1], rel=1e-14)
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-14)
    flat.clear()
    assert float(global_norm(flat)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_types_add_up_in_float32(dtype: torch.dtype) -> None:
    flat = flat_of(made(dtype))
    for number in range(3000):  # a bfloat16 sum of ones stops at 256, a float16 sum at 2048
        for bucket in flat.trained:
            bucket.backward.add_(1.0)
            bucket.collect()
            assert number % 1000 or (bucket.backward == 0).all()
    assert all((bucket.gradient == 3000).all() for bucket in flat.trained)
    flat.clear()
    assert not any(bucket.gradient.any() or bucket.total.any() for bucket in flat.trained)


@pytest.mark.parametrize("family", ["gpt", "encoder_decoder"])
def test_tied_embeddings_stay_one_parameter_with_one_place(family: str) -> None:
    model = made(family=family)
    flat = flat_of(model)
    weight = model.get_parameter("embedding.tokens.weight")
    assert model.head.output.weight is weight
    if family == "encoder_decoder":
        assert model.get_submodule("bridge").embedding.tokens.weight is weight  # type: ignore[union-attr]
    places = {"embedding.tokens.weight", "bridge.embedding.tokens.weight", "head.output.weight"}
    (bucket,) = (bucket for bucket in flat.buckets if places & names_in(bucket))
    table = view(bucket, bucket.weights, "embedding.tokens.weight")
    table[5] += 1.0
    assert torch.equal(model.head.output.weight[5], table[5])
    flat.backward(0, [model.head.output(torch.ones(1, CONFIG.hidden)).sum()], [None], last=True)
    flat.finish()
    assert (view(bucket, bucket.gradient, "embedding.tokens.weight")[: CONFIG.vocab_size] == 1).all()


def test_the_norm_of_a_large_buffer_is_exact() -> None:
    """One float32 sum over as many squares would be off, and by how much would depend on the cut."""
    config = ModelConfig(layers=1, hidden=16, heads=2, seq_length=8, vocab_size=2**18 + 7, vocab_multiple=1, position="none")
    flat = flat_of(build_model(config))
    draw = torch.Generator().manual_seed(0)
    for bucket in flat.trained:
        bucket.gradient.normal_(generator=draw)
    expected = math.sqrt(sum(float(bucket.gradient.double().square().sum()) for bucket in flat.trained))
    assert abs(float(global_norm(flat)) / expected - 1) < 1e-8


def test_padding_of_the_vocabulary_does_not_count_in_the_norm() -> None:
    flat = flat_of(made())
    for bucket in flat.trained:
        bucket.gradient.fill_(1.0)
    assert float(global_norm(flat)) ** 2 == pytest.approx(sum(math.prod(part.shape) for part in flat.stages.parts()), rel=1e-12)


def test_dtypes_are_kept_apart_and_frozen_parameters_out() -> None:
    model = made()
    model.head.norm.double()
    model.get_submodule("blocks.0").requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flat = flat_of(model)
    optimizer = build_optimizer(flat, OptimConfig(weight_decay=0.5))
    assert model.head.norm.weight.dtype == torch.float64
    assert {name for bucket in flat.buckets if not bucket.trained for name in names_in(bucket)} == {
        n for n in before if n.startswith("blocks.0.")
    }
    for bucket in flat.trained:
        bucket.gradient.fill_(1.0)
    optimizer.step(1, 0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("blocks.0.")
    kinds: dict[str, set[str]] = {}
    for piece in optimizer.pieces():
        kind, _, name = piece.name.partition("/")
        kinds.setdefault(kind, set()).add(name)
    every = {part.name for part in parts_of(model)}
    trained = {name for name in every if not name.startswith("blocks.0.")}
    assert kinds == {"weight": every, "moment1": trained, "moment2": trained}


def test_a_parameter_that_a_batch_does_not_use_has_no_gradient_and_stays() -> None:
    """The head's own weight, when the loss is of the hidden features; its bucket must not wait for it."""
    model = build_model(ModelConfig(**{**vars(CONFIG), "tie_embeddings": False}))
    initialise(model, 1)
    flat = flat_of(model)
    flat.backward(0, [model(STATE)["hidden"].sin().sum()], [None], last=True)
    flat.finish()
    (bucket,) = (bucket for bucket in flat.buckets if "head.output.weight" in names_in(bucket))
    assert not view(bucket, bucket.gradient, "head.output.weight").any()
    assert view(bucket, bucket.gradient, "head.norm.weight").any()


def test_released_memory_comes_back_under_the_same_views() -> None:
    flat = torch.arange(10.0)
    part = flat[3:5]
    assert not is_released(flat)
    release(flat)
    assert is_released(flat)
    assert flat.untyped_storage().size() == 0
    restore(flat)
    assert not is_released(flat)
    flat.copy_(torch.arange(10.0))
    assert torch.equal(part, torch.tensor([3.0, 4.0]))
    assert not is_released(torch.empty(0)), "nothing cannot be given back"


def small_bucket(monkeypatch: pytest.MonkeyPatch, ranks: int, rank: int) -> Bucket:
    """A matrix of rows q and k, and a bias, 17 elements, dealt to some ranks: k is held twice, the bias four times."""
    parameters = {"bias": nn.Parameter(torch.zeros(5)), "weight": nn.Parameter(torch.arange(12.0).view(4, 3))}
    parts = [
        Part("q", "weight", 0, (4, 3), 0.1, size=(2, 3)),
        Part("k", "weight", 2, (2, 3), 0.1, copies=2, partial=True),
        Part("b", "bias", 0, (5,), None, copies=4, partial=True),
        Part("elsewhere", "other", 0, (5,), None),
    ]
    return Bucket(parameters, parts, Sharding(place(monkeypatch, rank, shard=ranks).data, Group()), Home())


@pytest.mark.parametrize(
    ("ranks", "rank", "norm"),
    [
        (1, 0, [(0, 6, 1), (6, 12, 2), (12, 17, 4)]),
        (3, 0, [(0, 6, 1)]),
        (3, 1, [(0, 6, 2)]),
        (3, 2, [(0, 5, 4)]),  # the last element is padding
        (4, 0, [(0, 5, 1)]),
        (4, 1, [(0, 1, 1), (1, 5, 2)]),
        (4, 2, [(0, 2, 2), (2, 5, 4)]),
        (4, 3, [(0, 2, 4)]),
        (20, 18, []),  # all padding
    ],
)
def test_ranges_of_a_slice(monkeypatch: pytest.MonkeyPatch, ranks: int, rank: int, norm: list[tuple[int, int, int]]) -> None:
    bucket = small_bucket(monkeypatch, ranks, rank)
    assert [(found.start, found.stop, held) for found, held in bucket.norm_ranges()] == norm
    assert bucket.partial_ranges() == {2: [slice(6, 12)], 4: [slice(12, 17)]}, "of the whole bucket, the same on every rank"
    whole = torch.cat([torch.arange(12.0), torch.zeros(ranks * bucket.share - 12)])
    assert torch.equal(bucket.master, whole[rank * bucket.share :][: bucket.share])


def test_neighbours_of_the_same_kind_are_one_range() -> None:
    parameters = {"weight": nn.Parameter(torch.zeros(6, 2))}
    parts = [Part(name, "weight", start, (2, 2), 0.1, copies=2, partial=True) for name, start in (("a", 2), ("b", 0), ("c", 4))]
    bucket = Bucket(parameters, parts, Sharding(Group(), Group()), Home())
    assert bucket.norm_ranges() == [(slice(0, 12), 2)]
    assert bucket.partial_ranges() == {2: [slice(0, 12)]}


@pytest.mark.parametrize("ranks", [1, 3, 4, 20])
def test_slices_of_all_ranks_hold_every_element_once(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    times = {"q": torch.zeros(4, 3), "k": torch.zeros(2, 3), "b": torch.zeros(5)}
    for rank in range(ranks):
        bucket = small_bucket(monkeypatch, ranks, rank)
        for piece in bucket.pieces("weight", bucket.master):
            assert len(piece.values) == sum(box.count for box in piece.boxes) > 0
            for box in piece.boxes:
                times[piece.name.removeprefix("weight/")][box.slices()] += 1
    assert (times["q"][:2] == 1).all()
    assert (times["q"][2:] == 0).all(), "another tensor rank's"
    assert (times["k"] == 1).all()
    assert (times["b"] == 1).all()
