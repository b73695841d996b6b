"""Collectives through the memory of one machine are those of gloo; ranks that end are noticed, and nothing stays behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Keys, batch_of, engine_of, share
from pool import pool
from torch import Tensor

from teratron.parallel import mesh as mesh_module
from teratron.parallel.host import Host
from teratron.parallel.mesh import Group, Mesh, Pending
from teratron.parallel.worker import LOST, _kind

pytestmark = pytest.mark.xdist_group("ranks")


def summed(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    out = torch.empty_like(x)
    return out, group.sum(x, out)


def summed_in_place(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    out = x.clone()
    return out, group.sum(out)


def largest(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    out = x.clone()
    return out, group.max(out)


def gathered(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    out = x.new_empty(group.size, *x.shape)
    return out, group.gather(out, x)


def gathered_in_place(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    out = x.new_empty(group.size, *x.shape)
    out[group.rank] = x
    return out, group.gather(out, out[group.rank])


def gathered_apart(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    """Into a tensor whose ranks do not lie one behind the other."""
    out = x.new_empty(len(x), group.size, *x.shape[1:]).movedim(1, 0)
    return out, group.gather(out, x)


def scattered(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    out = x.new_empty(len(x) // group.size, *x.shape[1:])
    return out, group.scatter_sum(out, x)


def scattered_apart(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    """Of a tensor whose pieces do not lie one behind the other."""
    pieces = x.t().contiguous().t()
    out = x.new_empty(len(x) // group.size, *x.shape[1:])
    return out, group.scatter_sum(out, pieces)


WAYS: list[Callable[[Group, Tensor], tuple[Tensor, Pending]]] = [
    summed, summed_in_place, largest, gathered, gathered_in_place, gathered_apart, scattered, scattered_apart,
]  # fmt: skip
TYPES = torch.float64, torch.float32, torch.bfloat16, torch.int64


def drawn(rank: int, ranks: int, number: int, dtype: torch.dtype) -> Tensor:
    """Of any size, alike on all ranks."""
    rows = ranks * (1 + number % 5)
    return (100 * torch.randn(rows, 1 + 37 * number % 11, generator=torch.Generator().manual_seed(100 * number + rank))).to(dtype)


def both_ways(rank: int, ranks: int) -> list[tuple[str, Tensor, Tensor]]:
    """What came of every collective through memory and through gloo, most of them under way at once and finished in another order."""
    group = Mesh({"tensor": ranks}, rank).tensor
    assert group.line is not None
    found = []
    for dtype in TYPES:
        inputs = [(way, drawn(rank, ranks, number, dtype)) for number, way in enumerate(WAYS * 2)]
        begun = [way(group, x) for way, x in inputs]
        for _, pending in begun[::2] + begun[::-1]:
            pending.wait()
        for (way, x), (mine, _) in zip(inputs, begun, strict=True):
            theirs, pending = way(replace(group, line=None), x)
            pending.wait()
            found.append((f"{way.__name__} {dtype}", mine, theirs))
    return found


def test_every_collective_is_that_of_gloo_bit_for_bit() -> None:
    """Between two ranks, where a sum has one order only."""
    for found in pool().run(both_ways, 2):
        assert len(found) == len(TYPES) * len(WAYS) * 2
        for what, mine, theirs in found:
            assert torch.equal(mine, theirs), what


def test_more_ranks_add_up_in_rank_order() -> None:
    everyone = pool().run(both_ways, 3)
    for number in range(len(everyone[0])):
        what, mine, theirs = everyone[0][number]
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=5, msg=what)  # gloo has an order of its own
        name, dtype = what.split(" torch.")
        if name.startswith("summed"):
            a, b, c = (drawn(rank, 3, number % (2 * len(WAYS)), getattr(torch, dtype)) for rank in range(3))
            assert all(torch.equal(found[number][1], a + b + c) for found in everyone), what


def many_times(rank: int, ranks: int) -> tuple[int, list[str]]:
    """How much of its outbox a rank has used after many sums; and what the outbox is, to the system."""
    mesh, x = Mesh({"tensor": ranks}, rank), torch.ones(1000)
    for _ in range(50):
        y = x.clone()
        mesh.tensor.sum(y).wait()
        assert torch.equal(y, ranks * x)
    assert mesh.host is not None
    lines = Path("/proc/self/maps").read_text().splitlines()
    return int(mesh.host.outbox[: 2**20].count_nonzero()), [line for line in lines if "/memfd:teratron" in line]


def test_outboxes_are_used_again_and_have_no_file() -> None:
    for used, places in pool().run(many_times, 2):
        assert 1000 <= used <= 3 * 4000, "room for what one rank sends while the other still reads the one before"
        assert len(places) == 2
        assert all("(deleted)" in place for place in places), "gone with the processes"


def test_ranks_of_two_machines_have_no_line() -> None:
    host = Host(torch.zeros(8, dtype=torch.uint8), {})
    assert host.line([3], 0) is not None
    assert host.line([3, 4], 0) is None


def left_behind(rank: int, ranks: int) -> str:
    """What rank 0 makes of the end of the other process."""
    group = Mesh({"tensor": ranks}, rank).tensor
    group.sum(torch.ones(1)).wait()
    if rank == 1:
        return ""
    try:
        while True:
            group.sum(torch.ones(1)).wait()
    except RuntimeError as error:
        return _kind(error)


def test_a_rank_that_ends_is_noticed_as_a_lost_connection() -> None:
    assert pool().run(left_behind, 2) == [LOST, ""]


def outlived(rank: int, ranks: int) -> Tensor:
    """What two ranks add up together when the other two have gone."""
    mesh, x = Mesh({"pipeline": 2, "tensor": 2}, rank), torch.ones(2)
    mesh.tensor.sum(x).wait()
    if rank >= 2 and mesh.host is not None:
        for peer in mesh.host.peers.values():
            peer._connection.close()
    dist.barrier()
    if rank < 2:
        mesh.tensor.sum(x).wait()
    return x


def test_ranks_that_need_nothing_more_may_leave() -> None:
    assert [found.tolist() for found in pool().run(outlived, 4)] == [[4.0] * 2] * 2 + [[2.0] * 2] * 2


def trained(rank: int, ranks: int, keys: Keys, shared: bool) -> list[Tensor]:
    """What the buckets hold after two steps."""
    with contextlib.nullcontext() if shared else mock.patch.object(mesh_module, "meet", return_value=None):
        engine = engine_of(rank, ranks, keys)
    assert (engine.mesh.host is not None) is shared
    for step in (1, 2):
        engine.step(share(engine, batch_of(engine.config, step)), step=step, number=step, lr=0.01)
    return [bucket.master for bucket in engine.flat.buckets]


@pytest.mark.parametrize(
    "keys",
    [{"parallel.tensor": 2, "parallel.sequence": True}, {"parallel.shard": "parameters", "train.precision": "bf16"}],
    ids=["sequence", "parameters"],
)
def test_training_through_gloo_is_the_same_bit_for_bit(keys: Keys) -> None:
    mine, theirs = (pool().run(trained, 2, keys, shared) for shared in (True, False))
    for ours, others in zip(mine, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
