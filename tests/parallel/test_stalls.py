"""A deadlock cannot hide: schedules that would wait for ever are refused, and a rank that waits in vain says for what, as do all others."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import engine_of
from pool import pool

from teratron.parallel.doing import ROOM, Doing, Stall, read_doing
from teratron.parallel.launch import launch
from teratron.parallel.mesh import Mesh
from teratron.parallel.schedule_actions import Schedule
from teratron.parallel.schedules import build_schedule
from teratron.parallel.simulate import ScheduleError
from teratron.train import engine as engine_module

pytestmark = pytest.mark.xdist_group("ranks")

SHORT = timedelta(seconds=4)
"""Long enough for groups to be made on a busy machine."""
WORKER = """
import signal, sys
from datetime import timedelta
import torch
from teratron.parallel.mesh import Mesh
from teratron.parallel.pipeline import Channels, Runtime
from teratron.parallel.schedules import build_schedule
from teratron.parallel.worker import connect, supervised, telling, this_worker

class Stages:
    def received(self, stage, micro_batch):
        return {"hidden": (2,)}
    def forward(self, stage, micro_batch, received):
        return {} if stage else {"hidden": torch.ones(2)}
    def backward(self, stage, micro_batch, gradients, split):
        if (stage, micro_batch) == (1, 1):
            signal.pause()
        return {"hidden": torch.ones(2)} if stage else {}

def run():
    worker = this_worker()
    connect(worker, torch.device("cpu"))
    mesh = Mesh({"pipeline": 2}, worker.rank, telling(), timedelta(seconds=4))
    Runtime(build_schedule("1f1b", 2, 3, 1), Channels.of(mesh), torch.float32, torch.device("cpu")).run(Stages())
    return 0

sys.exit(supervised(run))
"""


def test_a_pipeline_that_stands_still_says_what_every_rank_was_doing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    assert launch(2, [str(tmp_path / "worker.py")]) == 1
    assert capfd.readouterr().err.splitlines() == [
        "teratron: error: rank 0 waited in vain for another; the other ranks were stopped",
        "  rank 0: receive of the gradient of micro-batch 1 in stage 0, waiting for receive from rank 1 over ranks 0, 1 (pipeline another)",
        "  rank 1: backward of micro-batch 1 in stage 1",
    ]


OPERATIONS = {
    "all_reduce": lambda group, x: group.sum(x),
    "all_to_all_single": lambda group, x: group.exchange(torch.empty_like(x), x),
    "shift": lambda group, x: group.shift(torch.empty_like(x), x),
    "all_gather": lambda group, x: group.gather(torch.empty(2 * len(x)), x),
}


def left_alone(rank: int, ranks: int) -> dict[str, str]:
    """Rank 0 starts operations, each in a group of its own, for which the other never comes."""
    meshes = {operation: Mesh({"tensor": ranks}, rank, timeout=SHORT) for operation in OPERATIONS}
    groups = {operation: mesh.another("tensor") for operation, mesh in meshes.items()}
    found = {}
    if rank == 0:
        begun = {operation: start(groups[operation], torch.ones(4)) for operation, start in OPERATIONS.items()}
        for operation, pending in begun.items():
            meshes[operation].doing.say("this test")
            try:
                pending.wait()
            except Stall as stall:
                found[operation] = str(stall)
    dist.barrier()  # over all ranks, with a longer patience
    return found


def test_collectives_that_nobody_joins_are_named() -> None:
    found = pool().run(left_alone, 2)[0]
    assert found.keys() == OPERATIONS.keys()
    for operation, said in found.items():
        assert re.fullmatch(rf"this test, waiting for {operation}\w* over ranks 0, 1 \(tensor another\)", said), said


def test_the_engine_refuses_a_schedule_that_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(*shape: Any) -> Schedule:
        made = build_schedule(*shape)
        return Schedule(made.name, made.placement, made.micro_batches, tuple(order[::-1] for order in made.actions))

    made = engine_of(0, 1, {})
    monkeypatch.setattr(engine_module, "build_schedule", backwards)
    with pytest.raises(ScheduleError, match=r"rank 0, action 0, backward of micro-batch 2 in stage 0: the output that it needs is not"):
        made._runtime(3)


def test_what_was_said_last_is_read_from_outside(tmp_path: Path) -> None:
    doing = Doing(tmp_path / "doing")
    assert read_doing(tmp_path / "doing") == ""
    doing.say("a long sentence")
    doing.say("short")
    assert read_doing(tmp_path / "doing") == "short"
    doing.say("ä" * ROOM)
    assert read_doing(tmp_path / "doing") == "ä" * (ROOM // 2)
    assert read_doing(tmp_path / "nobody") == ""
