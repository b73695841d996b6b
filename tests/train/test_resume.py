"""A killed run goes on as if nothing had happened: real SIGKILLs, at chosen and at arbitrary moments, the same command typed again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import assert_same_state, events, losses, options, write_text

DRIVER = """
import json, os, random, select, signal, sys, time
import torch
from teratron.cli.main import main

torch.set_num_threads(1)
from teratron.checkpoint import format as writer
from teratron.train import trainer
from teratron.train.engine import Engine
trainer.measure_peak = lambda device, dtype: 1e11  # a third of a second each time

def kill_at(module, name, number):
    function, left = getattr(module, name), [number]
    def counted(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(module, name, counted)

def child(command, log, setup=lambda: None):
    pid = os.fork()
    if pid == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        setup()
        os._exit(main(command))
    return pid

def attempt(command, log, setup=lambda: None, seconds=None):
    pid = child(command, log, setup)
    handle = os.pidfd_open(pid)
    if seconds is not None and not select.select([handle], [], [], seconds)[0]:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def interrupted(job, points, draw):
    plain, cut, shaken = (job["command"] + ["--run", job[name]] for name in ("plain", "cut", "shaken"))
    start = time.monotonic()
    codes = {"plain": attempt(plain, job["log"]), "cut": [], "shaken": []}
    seconds = time.monotonic() - start
    for module, name, number in points:
        modules = {"os": os, "writer": writer, "trainer": trainer, "engine": Engine}
        codes["cut"].append(attempt(cut, job["log"], lambda: kill_at(modules[module], name, number)))
    for share in (0.1, 0.2, 0.3, 0.4, 0.5):  # the first comes early enough also where the machine was busier a moment ago
        codes["shaken"].append(attempt(shaken, job["log"], seconds=draw.uniform(share, 2 * share) * seconds))
    codes["ends"] = [attempt(cut, job["log"]), attempt(shaken, job["log"])]
    return codes

request = json.loads(sys.argv[1])
draw = random.Random(request["seed"])
print(json.dumps([interrupted(job, request["points"], draw) for job in request["jobs"]]))
"""
"""Forks a process a command, so that torch is imported once; each is killed by itself at a call, or from outside at a moment."""

POINTS = [
    ("engine", "step", 2),  # before anything was saved
    ("engine", "step", 5),
    ("writer", "_write_safetensors", 1),
    ("os", "fsync", 3),
    ("writer", "publish", 2),
    ("os", "rename", 2),
    ("engine", "evaluate", 1),
    ("writer", "_remove_leftovers", 2),
    ("trainer", "write_report", 1),
]
"""What a process does for the n-th time when it is killed."""


PRECISIONS = ("fp32", "bf16", "fp16")
SCALES = {"optim__initial_loss_scale": 2**22, "optim__loss_scale_window": 3, "optim__loss_scale_hysteresis": 1}
"""Of fp16: overflows all along."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PRECISION/plain, cut and shaken: a run never interrupted, one killed at POINTS, one killed from outside; and their exit codes."""
    folder = tmp_path_factory.mktemp("killed")
    text = write_text(folder / "text.txt")
    jobs = []
    for precision in PRECISIONS:
        keys = options(data__text=text, train__precision=precision, train__steps=24, train__eval_every=4, checkpoint__every=3, **SCALES)
        places = {name: str(folder / precision / name) for name in ("plain", "cut", "shaken", "log")}
        (folder / precision).mkdir()
        jobs.append({"command": ["train", *keys, "--device", "cpu"], **places})
    request = json.dumps({"jobs": jobs, "points": POINTS, "seed": 7})
    done = subprocess.run([sys.executable, "-c", DRIVER, request], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "codes.json").write_text(json.dumps(dict(zip(PRECISIONS, json.loads(done.stdout), strict=True))))
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kills_were_real_and_the_last_command_finished(killed: Path, precision: str) -> None:
    codes, log = json.loads((killed / "codes.json").read_text())[precision], (killed / precision / "log").read_text()
    assert codes["cut"] == [-9] * len(POINTS), log
    assert set(codes["shaken"]) <= {-9, 0}, log
    assert codes["shaken"][0] == -9, log
    assert [codes["plain"], *codes["ends"]] == [0, 0, 0], log


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("run", ["cut", "shaken"])
def test_everything_is_as_in_the_run_never_killed(killed: Path, precision: str, run: str) -> None:
    """Weights, moments, and every loss, bit for bit."""
    plain, other = killed / precision / "plain", killed / precision / run
    assert_same_state(plain, other)
    assert losses(plain) == losses(other)
    assert list(losses(plain)) == list(range(1, 25))
    evaluations = [{event["step"]: event["loss"] for event in events(folder, "eval")} for folder in (plain, other)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("run", ["cut", "shaken"])
def test_it_left_no_rubbish(killed: Path, precision: str, run: str) -> None:
    folder = killed / precision / run
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000021", "step-00000024"]
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_went_on_from_checkpoints(killed: Path, precision: str) -> None:
    resumed = [event["step"] for event in events(killed / precision / "cut", "resume")]
    assert resumed == sorted(resumed)
    assert len(set(resumed)) >= 3, "else it always began again"


def test_updates_were_skipped_before_and_after_the_kills(killed: Path) -> None:
    """Or the scale of float16 would have had nothing to go wrong with."""
    steps = events(killed / "fp16" / "plain", "step")
    assert {event.get("skipped", False) for event in steps[:12]} == {event.get("skipped", False) for event in steps[12:]} == {True, False}
