"""Runs of several processes that are struck: they end at once, name the dead, leave nothing behind, and the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import assert_same_state, events, losses, options, write_text

from teratron.checkpoint import newest_checkpoint
from teratron.cli.main import main

pytestmark = pytest.mark.xdist_group("ranks")

SOON = 15
"""Seconds from a death to the end of the job (it takes 1)."""
STEPS, SAVED = 8, 4
"""Each run is struck between the checkpoint of step SAVED and the end of that of step SAVED + 2."""
TWO, FOUR = ["--nproc=2", "--parallel.shard=parameters"], ["--nproc=4", "--parallel.tensor=2", "--parallel.shard=optimizer"]
BESIDE = [*TWO, "--checkpoint.asynchronous"]
"""Checkpoints are written while training goes on: what was saved when a rank is struck between saves is then a matter of time."""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
ASK = """
os.kill(os.getppid(), signal.SIGTERM)
from teratron.parallel.worker import stop_requested
while not stop_requested():
    os.sched_yield()
"""
BLOW = """
import json, os, signal, time
blow = json.loads(os.environ["BLOW"])
if os.environ.get("RANK") == str(blow["rank"]):
    from teratron.optim.optimizer import Optimizer
    from teratron.train import saving
    from teratron.train.engine import Engine

    def strike(original, reached):
        def struck(*args, **kwargs):
            if reached(*args, **kwargs) == blow["step"]:
                with open(blow["told"], "w") as told:
                    told.write(str(time.time()))
                exec(blow["deed"])
            return original(*args, **kwargs)
        return struck

    match blow["place"]:
        case "step":
            Engine.step = strike(Engine.step, lambda engine, batch, step, **more: step)
        case "update":
            Optimizer.step = strike(Optimizer.step, lambda optimizer, number, *more: number)
        case "save":
            saving.save_training = strike(saving.save_training, lambda run, config, pieces, state, *more: state.step)
        case "write":
            from teratron.checkpoint import format as writer
            writer.write_safetensors = strike(writer.write_safetensors, lambda path, entries: int(path.parent.name.split("-")[1][:8]))
"""
"""A module that Python imports when it starts: one rank does a deed when it reaches a place of a step."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def command(text: Path, run: Path, layout: list[str]) -> list[str]:
    beside = "--checkpoint.asynchronous" in layout
    keys = options(data__text=text, train__steps=STEPS, checkpoint__every=2, checkpoint__keep=0, log__every=1)
    keys += [] if beside else ["--no-checkpoint.asynchronous"]
    return ["train", *keys, *layout, "--run", str(run), "--device=cpu"]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(text, run, TWO)) == 0
    return run


@pytest.fixture(scope="module")
def undisturbed_four(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(text, run, FOUR)) == 0
    return run


class Job:
    """A run whose rank `rank` does a deed at a place (step, update, save, write) of a step, and what it has printed."""

    def __init__(self, folder: Path, command: list[str], rank: int, place: str, step: int, deed: str) -> None:
        self.folder = folder
        (folder / "sitecustomize.py").write_text(BLOW)
        blow = {"rank": rank, "place": place, "step": step, "deed": deed, "told": str(folder / "told")}
        modules = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": modules, "BLOW": json.dumps(blow), "OMP_NUM_THREADS": "1"}
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.process = subprocess.Popen([sys.executable, "-m", "teratron", *command], stdout=out, stderr=err, env=environment)

    def end(self, seconds: float = SOON) -> tuple[int, str]:
        """Its exit code and its errors, when it ended within some seconds after the blow and left no process."""
        code = self.process.wait(300)
        err = (self.folder / "err").read_text()
        assert (self.folder / "told").exists(), f"never struck: {err}"
        assert time.time() - float((self.folder / "told").read_text()) < seconds
        assert processes(self.folder) == []
        return code, err


def processes(folder: Path) -> list[str]:
    """The command lines of all processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        found += [f"{path.parent.name} {line}"] if str(folder) in line else []
    return found


Strike = Callable[..., Job]


@pytest.fixture
def strike(text: Path, tmp_path: Path) -> Iterator[Strike]:
    """Start a run in the test's folder that will be struck; what is left of it is killed after the test."""
    jobs: list[Job] = []

    def begin(rank: int, place: str, step: int, deed: str, layout: list[str] = TWO) -> Job:
        jobs.append(Job(tmp_path, command(text, tmp_path / "run", layout), rank, place, step, deed))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.process.kill()
        job.process.wait()
    for line in processes(tmp_path):
        os.kill(int(line.split()[0]), signal.SIGKILL)


def saved(run: Path) -> int:
    """The step of the newest checkpoint; nothing half-written lies about that passes for one."""
    found = newest_checkpoint(run, pytest.fail)
    assert found is not None
    return found.step


def assert_goes_on(text: Path, run: Path, undisturbed: Path, layout: list[str] = TWO) -> None:
    """With the same command, from the step that was saved, to the end of a run that was never struck, bit for bit."""
    step = saved(run)
    assert main(command(text, run, layout)) == 0
    assert [event["step"] for event in events(run, "resume")] == [step]
    assert losses(run) == losses(undisturbed)
    assert_same_state(run, undisturbed)


@pytest.mark.parametrize(("rank", "place", "step"), [(0, "update", SAVED + 1), (1, "save", SAVED + 2)])
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(
    text: Path, undisturbed: Path, strike: Strike, rank: int, place: str, step: int
) -> None:
    """In the middle of a step, and while the others write a checkpoint."""
    job = strike(rank, place, step, KILL)
    assert job.end() == (1, f"teratron: error: rank {rank} was killed by SIGKILL (out of memory?); the other ranks were stopped\n")
    assert saved(job.folder / "run") == SAVED, "the survivors do not save"
    assert_goes_on(text, job.folder / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_each_of_four_ranks_may_be_killed(text: Path, undisturbed_four: Path, strike: Strike, rank: int) -> None:
    job = strike(rank, "step", SAVED + 1, KILL, FOUR)
    assert job.end() == (1, f"teratron: error: rank {rank} was killed by SIGKILL (out of memory?); the other ranks were stopped\n")
    assert saved(job.folder / "run") == SAVED
    assert_goes_on(text, job.folder / "run", undisturbed_four, FOUR)


def test_sigterm_to_the_launcher_saves_where_all_ranks_are(text: Path, undisturbed: Path, strike: Strike) -> None:
    """The rank that does not lead is the first to know."""
    job = strike(1, "step", SAVED + 1, ASK)
    assert job.end(seconds=120) == (75, "\nSIGTERM: finishing this step, then saving (again = stop at once)\n")
    run = job.folder / "run"
    assert saved(run) == SAVED + 1
    assert [(event["step"], event["reason"]) for event in events(run, "end")] == [(SAVED + 1, "preempted")]
    said = (job.folder / "out").read_text()
    assert re.search(rf"^stopped at step {SAVED + 1} of {STEPS}; to go on: .* train --run \S+ --nproc 2$", said, re.MULTILINE), said
    assert_goes_on(text, run, undisturbed)


def test_a_disk_that_fills_up_under_one_rank_while_training_goes_on_stops_all_with_one_sentence(strike: Strike) -> None:
    job = strike(1, "write", SAVED, "raise OSError(28, 'No space left on device')", BESIDE)
    code, err = job.end()
    folder = job.folder / "run" / "checkpoints"
    assert code == 2
    assert err.startswith(f"teratron: error: {folder}: disk full: a checkpoint needs 1 MiB")
    assert err.count("\n") == 1
    assert os.listdir(folder) == [f"step-{SAVED - 2:08d}"]


def test_a_rank_killed_while_it_writes_beside_training_loses_nothing(text: Path, undisturbed: Path, strike: Strike) -> None:
    job = strike(0, "write", SAVED, KILL, BESIDE)
    assert job.end() == (1, "teratron: error: rank 0 was killed by SIGKILL (out of memory?); the other ranks were stopped\n")
    assert saved(job.folder / "run") == SAVED - 2
    assert_goes_on(text, job.folder / "run", undisturbed, BESIDE)


def test_sigterm_to_a_worker_is_a_death_and_saves_nothing(strike: Strike) -> None:
    job = strike(1, "step", SAVED + 1, "os.kill(os.getpid(), signal.SIGTERM)")
    assert job.end() == (1, "teratron: error: rank 1 was killed by SIGTERM; the other ranks were stopped\n")
    assert saved(job.folder / "run") == SAVED


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a dead process")
def test_a_killed_launcher_leaves_no_process_and_a_run_that_goes_on(text: Path, undisturbed: Path, strike: Strike) -> None:
    job = strike(1, "step", SAVED + 1, "os.kill(os.getppid(), signal.SIGKILL); signal.pause()")
    assert job.process.wait(300) == -signal.SIGKILL
    end = time.monotonic() + SOON
    while processes(job.folder):
        assert time.monotonic() < end, processes(job.folder)
    assert saved(job.folder / "run") == SAVED
    assert_goes_on(text, job.folder / "run", undisturbed)


def test_the_rank_that_raises_is_told_with_its_traceback_and_no_other(strike: Strike) -> None:
    job = strike(1, "step", SAVED + 1, "raise ZeroDivisionError('of rank 1')")
    code, err = job.end()
    assert code == 1
    first, second, *_, last = err.splitlines()
    assert first == "teratron: error: rank 1 raised ZeroDivisionError: of rank 1; the other ranks were stopped"
    assert (second, last) == ("Traceback (most recent call last):", "ZeroDivisionError: of rank 1")
    assert err.count("Traceback") == 1, "not of rank 0, which lost its connection"
    assert saved(job.folder / "run") == SAVED


def test_torchrun_starts_the_same_training(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "teratron"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [*torchrun, *command(text, tmp_path / "run", TWO[1:])]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert_same_state(tmp_path / "run", undisturbed)
