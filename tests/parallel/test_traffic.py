"""When gradients and weights travel, and how long buffers are whole: needless communication and memory are seen here."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import batch_of, engine_of, share
from pool import pool
from torch import Tensor

from teratron.models import initial_values
from teratron.parallel.buckets import Bucket, is_released
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Group, Pending
from teratron.train.engine import Engine

pytestmark = pytest.mark.xdist_group("ranks")

SHARDS = ("none", "optimizer", "gradients", "parameters")
shards = pytest.mark.parametrize("shard", SHARDS)
LAYERS = 6


def one_step(engine: Engine) -> None:
    engine.step(share(engine, batch_of(engine.config, 1)), step=1, number=1, lr=0.01)


def unit_of(bucket: Bucket) -> str:
    """Such as blocks.0, or embedding.tokens for the embedding."""
    return ".".join(next(iter(bucket.places)).removeprefix("models.0.").split(".")[:2])


def traffic_probe(rank: int, ranks: int, keys: dict[str, Any]) -> tuple[list[list[int]], int]:
    """Elements of each collective of data ranks during each micro-batch's backward pass, and elements of all buckets."""
    engine = engine_of(rank, ranks, keys)
    messages: list[list[int]] = []
    start, backward = Group._start, FlatModel.backward

    def counted(group: Group, collective: Any, *tensors: Tensor, **options: Any) -> Pending:
        if group.ranks == engine.mesh.data.ranks and recording:
            messages[-1].append(max(tensor.numel() for tensor in tensors))
        return start(group, collective, *tensors, **options)

    def marked(*args: Any) -> None:
        nonlocal recording
        messages.append([])
        recording = True
        backward(*args)
        recording = False

    recording = False
    with mock.patch.object(Group, "_start", counted), mock.patch.object(FlatModel, "backward", marked):
        one_step(engine)
    return messages, sum(len(bucket.backward) for bucket in engine.flat.trained)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_gradients_travel_only_in_the_last_micro_batch(shard: str, ranks: int) -> None:
    for messages, size in pool().run(traffic_probe, ranks, {"parallel.shard": shard, "train.micro_batch": 1}):
        *earlier, last = messages
        assert len(earlier) == 8 // ranks - 1
        assert not any(earlier)
        assert sum(last) == size, "each gradient once"


def test_sharded_gradients_travel_in_every_micro_batch() -> None:
    """There is no room for a whole sum: the contrast that shows the counting counts."""
    for messages, size in pool().run(traffic_probe, 2, {"parallel.shard": "gradients", "train.micro_batch": 1}):
        assert [sum(sizes) for sizes in messages] == [size] * 4


def overlap_probe(rank: int, ranks: int, keys: dict[str, Any]) -> list[str]:
    """Events of one backward pass: gradients of blocks that begin to arrive and end to, reductions that start."""
    engine = engine_of(rank, ranks, keys)
    events: list[str] = []
    send = FlatModel._send

    def sent(flat: FlatModel, bucket: Bucket, gradient: Tensor) -> None:
        events.append(f"reduce {unit_of(bucket)}")
        send(flat, bucket, gradient)

    for number, block in engine.model.blocks.items():
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: events.append(f"slope blocks.{number}"))
    with mock.patch.object(FlatModel, "_send", sent):
        one_step(engine)
    return events


@shards
def test_reduction_begins_while_backward_goes_on(shard: str) -> None:
    """A block's reduction has started before the first gradient of the block before it is there."""
    for events in pool().run(overlap_probe, 2, {"parallel.shard": shard, "model.layers": LAYERS}):
        for block in range(1, LAYERS):
            assert events.index(f"reduce blocks.{block}") < events.index(f"slope blocks.{block - 1}")
        assert events[-1].startswith("reduce embedding")


def copies_probe(rank: int, ranks: int, keys: dict[str, Any]) -> tuple[list[str], set[torch.dtype], int]:
    """Gradients of blocks that begin to arrive, and sums over the copies of slices that start, in one step with two micro-batches; the
    types that these sums travel in, and how many buckets there are."""
    engine = engine_of(rank, ranks, keys | {"model.layers": LAYERS, "train.micro_batch": 1, "train.global_batch": 8})
    events: list[str] = []
    types: set[torch.dtype] = set()
    start, copies = Group._start, engine.mesh.group("replicate").ranks

    def started(group: Group, collective: Any, *tensors: Tensor, **options: Any) -> Pending:
        if group.ranks == copies and tensors[0].numel() in shares:
            events.append("copies")
            types.add(tensors[0].dtype)
        return start(group, collective, *tensors, **options)

    shares = {bucket.share for bucket in engine.flat.trained}
    for number, block in engine.model.blocks.items():
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: events.append(f"slope blocks.{number}"))
    with mock.patch.object(Group, "_start", started):
        one_step(engine)
    return events, types, len(engine.flat.trained)


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
@pytest.mark.parametrize("shard", SHARDS[1:])
def test_hybrid_sharding_sums_over_copies_while_backward_goes_on(shard: str, reduce: str) -> None:
    """Once a step, in the type asked for; a block's sum has started when the block two before it begins."""
    keys = {"parallel.shard": shard, "parallel.replicate": 2, "parallel.reduce": reduce, "train.precision": "bf16"}
    for events, types, buckets in pool().run(copies_probe, 4, keys):
        assert events.count("copies") == buckets
        assert types == {torch.bfloat16 if reduce == "bf16" else torch.float32}
        last = len(events) - events[::-1].index(f"slope blocks.{LAYERS - 1}")
        assert "copies" not in events[: events.index("slope blocks.0")], "not in the first micro-batch"
        for block in range(LAYERS - 2):
            begun = events.index(f"slope blocks.{block}", last)
            assert events[:begun].count("copies") >= LAYERS - 2 - block


def gather_probe(rank: int, ranks: int) -> list[str]:
    """Events of one step with sharded parameters: gathers that start, units that run forward."""
    engine = engine_of(rank, ranks, {"parallel.shard": "parameters", "model.layers": LAYERS})
    events: list[str] = []
    owner = {bucket.shard.data_ptr(): unit_of(bucket) for bucket in engine.flat.buckets}
    gather = Group.gather

    def gathered(group: Group, out: Tensor, x: Tensor) -> Pending:
        events.append(f"gather {owner[x.data_ptr()]}")
        return gather(group, out, x)

    for name, block in engine.model.blocks.items():
        block.attention.qkv.register_forward_hook(lambda *_, name=name: events.append(f"forward blocks.{name}"))
    with mock.patch.object(Group, "gather", gathered):
        one_step(engine)
    return events


def test_weights_are_gathered_ahead_of_their_use() -> None:
    """The next block's weights are under way before a block computes; each block's travel twice a step."""
    for events in pool().run(gather_probe, 2):
        for block in range(LAYERS - 1):
            assert events.index(f"gather blocks.{block + 1}") < events.index(f"forward blocks.{block}")
        assert [events.count(f"gather blocks.{block}") for block in range(LAYERS)] == [2] * LAYERS


def whole(buffers: list[Tensor]) -> int:
    """How many buffers have memory."""
    return sum(not is_released(buffer) for buffer in buffers)


def memory_probe(rank: int, ranks: int, keys: dict[str, Any]) -> tuple[int, dict[str, list[int]]]:
    """How many buckets there are, and how many whole buffers: of both kinds while the model is made; weights and gradients wherever in a
    step a module ends or a gradient arrives; both after the step, and after an evaluation."""
    made: list[Bucket] = []
    found: dict[str, list[int]] = {"made": [], "weights": [], "gradients": [], "after": []}
    init = Bucket.__init__

    def noted(bucket: Bucket, *args: Any) -> None:
        init(bucket, *args)
        made.append(bucket)
        found["made"].append(both())

    def both() -> int:
        return whole([bucket.weights for bucket in made]) + whole([bucket.backward for bucket in made])

    def counted(*args: Any) -> Tensor:
        found["made"].append(both())
        return initial_values(*args)

    def sample(*_: Any) -> None:
        found["weights"].append(whole([bucket.weights for bucket in made]))
        found["gradients"].append(whole([bucket.backward for bucket in made]))

    with mock.patch.object(Bucket, "__init__", noted), mock.patch("teratron.optim.optimizer.initial_values", counted):
        engine = engine_of(rank, ranks, keys)
    for module in engine.model.modules():
        module.register_forward_hook(sample)
    for parameter in engine.model.parameters():
        parameter.register_post_accumulate_grad_hook(sample)
    one_step(engine)
    found["after"].append(both())
    engine.evaluate([share(engine, batch_of(engine.config, 7))])
    found["after"].append(both())
    return len(made), found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"train.recompute": "full", "train.micro_batch": 2}], ids=["plain", "recomputed"])
def test_sharded_parameters_are_never_whole_together(tied: bool, options: dict[str, Any]) -> None:
    """A unit in use, the next one on its way, and one that is on its way out; the tied table while the head needs it."""
    keys = {"parallel.shard": "parameters", "model.layers": LAYERS, "model.tie_embeddings": tied} | options
    for buckets, found in pool().run(memory_probe, 2, keys):
        assert buckets == LAYERS + 2
        assert 2 <= max(found["weights"]) <= 3 + tied
        assert 1 <= max(found["gradients"]) <= 2 + tied
        assert found["after"] == [0, 0]
        assert len(found["made"]) > buckets
        assert max(found["made"]) == 0


def test_sharded_gradients_are_never_whole_together() -> None:
    for buckets, found in pool().run(memory_probe, 2, {"parallel.shard": "gradients", "model.layers": LAYERS}):
        assert min(found["weights"]) == buckets
        assert 1 <= max(found["gradients"]) <= 3
        assert found["after"] == [buckets, buckets], "weights stay, gradients do not"


def state_probe(rank: int, ranks: int, keys: dict[str, Any]) -> dict[str, int]:
    """Elements that a rank keeps between steps."""
    engine = engine_of(rank, ranks, keys)
    one_step(engine)
    buckets = engine.flat.trained
    storages = {
        "weights": [bucket.weights for bucket in buckets] + [bucket.shard for bucket in buckets],
        "gradients": [bucket.backward for bucket in buckets] + [bucket.gradient for bucket in buckets],
        "moments": [flat for flats in engine.optimizer.state.values() for flat in flats],
    }
    return {kind: _elements(flats) for kind, flats in storages.items()}


def _elements(flats: list[Tensor]) -> int:
    """Memory of each storage once, in elements of float64."""
    return sum({flat.untyped_storage()._cdata: flat.untyped_storage().nbytes() for flat in flats}.values()) // torch.float64.itemsize


@shards
def test_ranks_keep_their_share_between_steps(shard: str) -> None:
    """ZeRO 1, 2, 3: moments, gradients, weights are a quarter on each of four ranks, what is not sharded is whole."""
    whole_state, *_ = [state_probe(0, 1, {})]
    sharded = {"moments": shard != "none", "gradients": shard in SHARDS[2:], "weights": shard == "parameters"}
    for found in pool().run(state_probe, 4, {"parallel.shard": shard}):
        for kind, count in found.items():
            assert count == pytest.approx(whole_state[kind] / (4 if sharded[kind] else 1), rel=0.02), kind
