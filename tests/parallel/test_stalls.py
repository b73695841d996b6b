"""A deadlock cannot hide: a rank that waits in vain says for what, as do all others; jobs that hang are ended, their ranks named."""

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

from teratron.parallel.doing import GROUPS, ROOM, Beat, Doing, Stall, read_beat
from teratron.parallel.hangs import account, differences
from teratron.parallel.launch import launch
from teratron.parallel.mesh import Mesh
from teratron.parallel.restart import Care
from teratron.parallel.schedule_actions import Schedule
from teratron.parallel.schedules import build_schedule
from teratron.parallel.simulate import ScheduleError
from teratron.train import engine as engine_module

pytestmark = pytest.mark.xdist_group("ranks")

SHORT = timedelta(seconds=10)
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
    mesh = Mesh({"pipeline": 2}, worker.rank, telling(), timedelta(seconds=10))
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
        words = rf"this test, waiting for #1 {operation}\w* of float32 \[4\] over ranks 0, 1 \(tensor another\)"
        assert re.fullmatch(words, said), said


def test_the_engine_refuses_a_schedule_that_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(*shape: Any) -> Schedule:
        made = build_schedule(*shape)
        return Schedule(made.name, made.placement, made.micro_batches, tuple(order[::-1] for order in made.actions))

    made = engine_of(0, 1, {})
    monkeypatch.setattr(engine_module, "build_schedule", backwards)
    with pytest.raises(ScheduleError, match=r"rank 0, action 0, backward of micro-batch 2 in stage 0: the output that it needs is not"):
        made._runtime(3)


HANGS = """
import os, signal, sys
import torch
from teratron.parallel.mesh import Mesh
from teratron.parallel.worker import connect, supervised, telling, this_worker

def run():
    worker = this_worker()
    connect(worker, torch.device("cpu"))
    mesh = Mesh({"tensor": worker.world}, worker.rank, telling())
    control = mesh.control
    mesh.tensor.sum(torch.ones(4)).wait()
    mesh.doing.at(5)
    mesh.doing.say("the passes")
    other = worker.rank == 1
    match sys.argv[1]:
        case "stops" if other:
            os.kill(os.getpid(), signal.SIGSTOP)
        case "skips one" if other:
            control.sum(torch.ones(1)).wait()
        case "another shape" if other:
            mesh.tensor.sum(torch.ones(2, 3)).wait()
        case "another one" if other:
            mesh.tensor.gather(torch.ones(8), torch.ones(4)).wait()
    mesh.tensor.sum(torch.ones(4)).wait()
    control.sum(torch.ones(1)).wait()
    return 0

sys.exit(supervised(run))
"""
WAITS = "  rank 0: step 5: the passes, waiting for #2 all_reduce of float32 [4] over ranks 0, 1 (tensor)"


def hang(folder: Path, how: str, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What is said of two ranks that do not meet."""
    (folder / "worker.py").write_text(HANGS)
    assert launch(2, [str(folder / "worker.py"), how], Care(hang_timeout=3), folder) == 1
    return capfd.readouterr().err.splitlines()


def test_a_rank_that_is_stopped_is_named_with_the_stacks_of_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    *said, last = hang(tmp_path, "stops", capfd)
    assert said == [
        "teratron: error: no progress for 3 s: rank 1 did not go on",
        "  collectives over ranks 0, 1 (tensor): rank 0 at #2 all_reduce of float32 [4], rank 1 at #1 all_reduce of float32 [4]",
        WAITS,
        "  rank 1: step 5: the passes; is stopped (SIGSTOP)",
    ]
    (path,) = (tmp_path / "hangs").iterdir()
    assert last == f"  Python stacks of all ranks: {path}"
    text = path.read_text()
    assert text.startswith("\n".join(said))
    assert re.search(r"^rank 0\n(.*\n)*.*worker.py\", line \d+ in run$", text, re.MULTILINE), text
    assert text.endswith("rank 1\n(no answer)\n")


@pytest.mark.parametrize(
    ("how", "other"),
    [
        ("another shape", "#2 all_reduce of float32 [2, 3]"),
        ("skips one", "#1 all_reduce of float32 [4]"),
        pytest.param("another one", "#2 all_gather", marks=pytest.mark.slow),
    ],
)
def test_collectives_that_do_not_match_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str, other: str) -> None:
    """Whether they hang, as most do, or gloo aborts."""
    (named,) = [line for line in hang(tmp_path, how, capfd) if line.startswith("  collectives over ranks 0, 1 (tensor): ")]
    assert "rank 0 at #2 all_reduce of float32 [4]" in named
    assert f"rank 1 at {other}" in named


def test_only_collectives_of_the_same_number_are_sure_not_to_match() -> None:
    """A rank that has died or is late has come to fewer."""
    kinds = {0: (7, "sum of float32 [4]"), 1: (7, "sum of float32 [4]"), 2: (6, "gather of float32 [2]")}
    beats = [Beat(9, 1, "x", {"over all": kind, "over none": (0, "")}) for kind in kinds.values()]
    line = "  collectives over all: ranks 0, 1 at #7 sum of float32 [4], rank 2 at #6 gather of float32 [2]"
    assert (differences(beats), differences(beats, certain=True)) == ([line], [])
    beats[1].collectives["over all"] = (7, "sum of float32 [8]")
    assert differences(beats, certain=True) == differences(beats) != [line]
    assert differences([beats[0]] * 3) == []
    assert account(beats[:1], {0: "; is late"}) == "  rank 0: step 1: x; is late"


def test_what_was_said_last_is_read_from_outside(tmp_path: Path) -> None:
    doing = Doing(tmp_path / "doing")
    assert read_beat(tmp_path / "doing") == read_beat(tmp_path / "nobody") == Beat()
    doing.say("a long sentence")
    doing.say("short")
    assert read_beat(tmp_path / "doing") == Beat(2, 0, "short")
    doing.at(3)
    doing.say("forward")
    doing.within("blocks.7")
    assert read_beat(tmp_path / "doing").words == "step 3: forward, blocks.7"
    doing.within("head")
    assert read_beat(tmp_path / "doing") == Beat(6, 3, "forward, head")
    doing.say("ä" * ROOM)
    assert read_beat(tmp_path / "doing").what == "ä" * (ROOM // 2)
    for group in map(str, range(GROUPS + 2)):
        doing.enter(group)
        doing.count(group, f"sum of {group}")
    assert doing.count("1", "max") == "#2 max"
    found = read_beat(tmp_path / "doing").collectives
    assert found == {str(n): (1, f"sum of {n}") for n in range(GROUPS)} | {"1": (2, "max")}
