"""Who a process is: what torchrun, srun and nothing at all leave in its environment, and which CUDA device it gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from teratron.config import UserError
from teratron.parallel.device import choose_device
from teratron.parallel.worker import DEFECT, LOST, USER, Worker, _kind, connect, launched, this_worker

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234567",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables; monkeypatch also takes back what `this_worker` sets."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {*TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "TERATRON_LAUNCHER"}:
            monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_process_on_its_own() -> None:
    assert this_worker() is None
    assert not launched()


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHRUN | SRUN)
    assert this_worker() == Worker(rank=5, world=8, local_rank=1, local_world=4)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],big1", "gpu07"), ("node3", "node3"), ("rack[1-2]n[01-04]", "rack1n01"), ("a,b[1-3]", "a"), ("n-1[4,6]", "n-14")],
)
def test_srun(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    set_all(monkeypatch, SRUN | {"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": "4,3", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"})
    assert this_worker() == Worker(rank=5, world=7, local_rank=1, local_world=3)
    assert os.environ["MASTER_ADDR"] == first
    assert 1024 < int(os.environ["MASTER_PORT"]) < 32768


def test_srun_without_a_list_of_nodes_and_with_an_address_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "MASTER_PORT": "77", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"})
    assert this_worker() == Worker(rank=5, world=7, local_rank=1, local_world=2)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "77")


@pytest.mark.parametrize("change", [{"SLURM_NTASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_ID": None}])
def test_one_task_and_a_batch_script_are_single(monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None]) -> None:
    set_all(monkeypatch, {name: value for name, value in (SRUN | change).items() if value is not None})
    assert this_worker() is None
    assert "MASTER_ADDR" not in os.environ


def test_a_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHRUN | {"WORLD_SIZE": "two"})
    with pytest.raises(UserError, match="WORLD_SIZE='two'"):
        this_worker()


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK"])
def test_a_worker_in_part_is_refused_rather_than_trained_alone(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    set_all(monkeypatch, {name: value for name, value in TORCHRUN.items() if name != missing})
    with pytest.raises(UserError, match=f"RANK=5 is set, but {missing} not: start with torchrun"):
        this_worker()


def test_a_world_of_one_needs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"RANK": "0", "WORLD_SIZE": "1"})
    assert this_worker() is None


def test_workers_that_do_not_know_where_to_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(rank=0, world=2, local_rank=0, local_world=2)
    with pytest.raises(UserError, match="MASTER_ADDR is not set, expected where the 2 processes meet"):
        connect(worker, torch.device("cpu"))
    set_all(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no number"})
    with pytest.raises(UserError, match=r"rank 0 of 2 could not join the others at MASTER_ADDR:MASTER_PORT = 127\.0\.0\.1:no number: "):
        connect(worker, torch.device("cpu"))


def test_a_child_of_a_worker_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERATRON_LAUNCHER", "1:/none")
    assert launched() == (os.getsid(0) == os.getpid())
    monkeypatch.setattr(os, "getsid", lambda pid: 1)
    assert not launched()


def test_every_worker_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHRUN)
    worker = Worker(rank=5, world=8, local_rank=1, local_world=4)
    give_devices(monkeypatch, 4)
    assert choose_device("auto", worker) == choose_device("cuda", worker) == torch.device("cuda", 1)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cpu", worker) == torch.device("cpu")
    give_devices(monkeypatch, 1)
    with pytest.raises(UserError, match=r"4 processes on a machine with 1 CUDA device:.*--nproc 1"):
        choose_device("auto", worker)
    monkeypatch.delenv("LOCAL_RANK")
    assert choose_device("auto", worker) == torch.device("cuda", 0), "srun shows each task its own only"
    give_devices(monkeypatch, 2)
    with pytest.raises(UserError, match="4 processes on a machine with 2 CUDA devices"):
        choose_device("cuda", worker)
    give_devices(monkeypatch, 0)
    assert choose_device("auto", worker) == torch.device("cpu")


def give_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


TORCHRUN_BODY = """
import atexit
from teratron.parallel.worker import supervised
atexit.register(lambda: print("at exit"))

def body():
    print("said", end="")
    {deed}

print(supervised(body))
"""


@pytest.mark.parametrize(
    ("deed", "code", "out", "err"),
    [
        ("return 0", 0, "saidat exit\n", ""),
        ("return 130", 130, "said", ""),
        (
            "raise RuntimeError('Connection closed by peer [127.0.0.1]')",
            1,
            "said",
            "teratron: error: rank 5 lost the connection to another.*",
        ),
        ("raise ZeroDivisionError('x')", 1, "said", "Traceback .*ZeroDivisionError: x"),
    ],
)
def test_a_worker_of_torchrun_tells_its_end_and_loses_nothing_that_was_said(
    monkeypatch: pytest.MonkeyPatch, deed: str, code: int, out: str, err: str
) -> None:
    """A lost connection in one line: its cause is another rank's to tell."""
    set_all(monkeypatch, TORCHRUN)
    done = subprocess.run([sys.executable, "-c", TORCHRUN_BODY.format(deed=deed)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, out)
    assert re.fullmatch(err, done.stderr.strip(), re.DOTALL), done.stderr
    assert "Traceback" in err or done.stderr.count("\n") == bool(err)


def after(first: BaseException, error: BaseException) -> BaseException:
    """`error`, raised while `first` was handled."""
    error.__context__ = first
    return error


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21179."


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(GLOO), LOST),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), LOST),
        (dist.DistBackendError("NCCL communicator was aborted"), LOST),
        (dist.DistNetworkError("The client socket has timed out after 600000ms"), LOST),
        (after(RuntimeError(GLOO), ValueError("I/O operation on closed file")), LOST),
        (after(RuntimeError(GLOO), UserError("the run could not be saved")), LOST),
        (after(ValueError("loss"), RuntimeError(GLOO)), DEFECT),
        (after(FileNotFoundError("data"), UserError("data: no such file")), USER),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), DEFECT),
        (ConnectionResetError("Connection reset by peer"), DEFECT),
    ],
)
def test_a_failure_is_somebody_elses_only_when_it_began_with_a_lost_connection(error: BaseException, kind: str) -> None:
    assert _kind(error) == kind
