"""A launcher that cares: a job whose worker dies or hangs starts again, so often and with so many processes as may be, to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_state, events, losses, options, write_text

from teratron.cli.main import main
from teratron.parallel.launch import launch
from teratron.parallel.restart import PERIOD, Care, End, Restarts

pytestmark = pytest.mark.xdist_group("ranks")

DEATH = End(1, "teratron: error: rank 1 was killed by SIGKILL (out of memory?); the other ranks were stopped", 1)
KILLED = "rank 1 was killed by SIGKILL (out of memory?)"


def test_a_death_is_told_in_one_line() -> None:
    assert DEATH.cause == KILLED


@pytest.mark.parametrize("end", [End(0), End(2, "a key is wrong"), End(130), End(75), End(141), End(1, "died", stopping=True)])
def test_only_a_death_that_nobody_asked_for_starts_again(end: End) -> None:
    assert Restarts(2, Care(restarts=3)).after(end) == (False, "")
    assert Restarts(2, Care()).after(DEATH) == (False, "")


def test_restarts_are_counted_anew_after_progress_and_after_an_hour() -> None:
    step, now = [0], [0.0]
    restarts = Restarts(2, Care(restarts=2, progress=lambda: step[0]), clock=lambda: now[0])
    said = []
    for checkpoint, seconds in ((0, 1), (0, 1), (5, 1), (5, 1), (5, PERIOD + 1), (5, 1), (5, 1)):
        step[0], now[0] = checkpoint, now[0] + seconds
        said.append(restarts.after(DEATH))
    again = [(True, f"teratron: starting again from the newest checkpoint (restart {n} of 2)") for n in (1, 2)]
    assert said == [*again, *again, *again, (False, "teratron: not started again: --restarts 2 without a newer checkpoint in between")]


def test_fewer_processes_follow_two_failed_starts_in_a_row_as_the_layout_allows() -> None:
    failed = End(1, "died", 1, trained=False)
    restarts = Restarts(8, Care(restarts=2, min_nproc=2, allows=lambda n: n % 3 == 0))
    assert [restarts.after(end)[0] for end in (failed, DEATH, failed)] == [True, True, False]
    restarts = Restarts(8, Care(restarts=2, min_nproc=2, allows=lambda n: n % 3 == 0))
    counts = []
    while restarts.after(failed)[0]:
        counts.append(restarts.nproc)
    assert counts == [8, 6, 6, 3, 3, 3]
    assert Restarts(8, Care(restarts=1, min_nproc=2)).fit() == ""


@pytest.mark.parametrize(("devices", "least", "expected"), [(0, 1, 4), (3, 1, 2), (3, 3, 4), (3, 0, 4), (4, 1, 4), (1, 1, 1)])
def test_fewer_devices_mean_fewer_processes(devices: int, least: int, expected: int) -> None:
    restarts = Restarts(4, Care(min_nproc=least, devices=lambda: devices, allows=lambda n: n in (1, 2)))
    said = restarts.fit()
    assert restarts.nproc == expected
    assert bool(said) == (expected < 4)


WORKER = """
import os, signal, sys
from pathlib import Path
from teratron.config import UserError
from teratron.parallel.worker import supervised, take_restarts, telling, this_worker

worker, folder = this_worker(), Path(sys.argv[2])
last = worker.rank == worker.world - 1

def run():
    doing = telling()
    fits = sys.argv[1] == "too many" and worker.world == 2
    if not last:
        return 0 if fits else signal.pause()
    if sys.argv[1] == "too many" and not fits:
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder / "attempts").open("a") as attempts:
        print(worker.world, [restart["cause"] for restart in take_restarts()], file=attempts)
    doing.at(1)
    match sys.argv[1]:
        case "raises":
            raise ZeroDivisionError("of the last")
        case "refuses":
            raise UserError("a key is wrong")
    return 0

sys.exit(supervised(run))
"""


def attempts(folder: Path, does: str, nproc: int, care: Care) -> tuple[int, list[str]]:
    """The exit code of a job whose last rank does something, and what it was told before: the number of ranks, and restarts."""
    (folder / "worker.py").write_text(WORKER)
    code = launch(nproc, [str(folder / "worker.py"), does, str(folder)], care)
    return code, (folder / "attempts").read_text().splitlines()


def test_a_job_that_always_fails_ends_after_its_restarts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cause = "'rank 1 raised ZeroDivisionError: of the last'"
    assert attempts(tmp_path, "raises", 2, Care(restarts=1)) == (1, ["2 []", f"2 [{cause}]"])
    err = capfd.readouterr().err
    assert err.count("Traceback") == 2
    assert err.count("teratron: starting again from the newest checkpoint (restart 1 of 1)\n") == 1
    assert err.endswith("teratron: not started again: --restarts 1 without a newer checkpoint in between\n")


def test_a_refusal_is_final(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert attempts(tmp_path, "refuses", 2, Care(restarts=3)) == (2, ["2 []"])
    assert capfd.readouterr().err == "teratron: error: rank 1: a key is wrong\n"


def test_a_job_goes_on_with_the_processes_that_can_be_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killed = "'rank 2 was killed by SIGKILL (out of memory?)'"
    assert attempts(tmp_path, "too many", 3, Care(restarts=2, min_nproc=1)) == (0, [f"2 [{killed}, {killed}]"])
    assert capfd.readouterr().err.endswith("teratron: 3 processes came to no step 2 times in a row: going on with 2\n")


BLOW = """
import json, os, signal
blow = json.loads(os.environ["BLOW"])
struck = os.path.exists(blow["told"])
if os.environ.get("RANK") == blow["rank"] and struck and blow["for good"]:
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == blow["rank"] and not struck:
    from teratron.train.engine import Engine
    step_of = Engine.step

    def struck(engine, batch, *, step, **more):
        if step == blow["step"]:
            open(blow["told"], "w").close()
            os.kill(os.getpid(), getattr(signal, blow["signal"]))
        return step_of(engine, batch, step=step, **more)

    Engine.step = struck
"""
"""A module that Python imports when it starts: one rank strikes itself at a step, once in a job; for good: it never starts again."""
STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def command(text: Path, run: Path, *more: str, **keys: Any) -> list[str]:
    keys = {"data__text": text, "train__steps": STEPS, "checkpoint__every": 2, "checkpoint__asynchronous": False} | keys
    return ["train", *options(**keys), "--run", str(run), "--device=cpu", "--nproc=2", *more]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(text, run)) == 0
    return run


def strike(
    folder: Path, line: list[str], sign: str, rank: int = 1, program: tuple[str, ...] = ("-m", "teratron"), good: bool = False
) -> str:
    """What a job says on stderr that ends well although a rank is struck at step 4."""
    (folder / "sitecustomize.py").write_text(BLOW)
    blow = {"rank": str(rank), "step": 4, "signal": sign, "told": str(folder / "told"), "for good": good}
    modules = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": modules, "BLOW": json.dumps(blow), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *program, *line], capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert (folder / "told").exists(), f"never struck: {done.stderr}"
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_undisturbed(run: Path, undisturbed: Path) -> None:
    """Bit for bit."""
    assert losses(run) == losses(undisturbed)
    assert_same_state(run, undisturbed)


def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_undisturbed(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    err = strike(tmp_path, command(text, tmp_path / "run", "--restarts=1"), "SIGKILL")
    assert err.splitlines() == [
        f"teratron: error: {KILLED}; the other ranks were stopped",
        "teratron: starting again from the newest checkpoint (restart 1 of 1)",
    ]
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2]
    (restart,) = events(tmp_path / "run", "restart")
    assert (restart["step"], restart["rank"], restart["cause"]) == (2, 1, KILLED)
    assert events(tmp_path / "run", "start")[0]["time"] < restart["time"] < events(tmp_path / "run", "resume")[0]["time"]
    assert_undisturbed(tmp_path / "run", undisturbed)


def test_a_worker_that_hangs_is_named_and_replaced(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    err = strike(tmp_path, command(text, tmp_path / "run", "--restarts=1", "--hang-timeout=15"), "SIGSTOP")
    first, *_, last = err.splitlines()
    assert first == "teratron: error: no progress for 15 s: rank 1 did not go on"
    assert "\n  rank 1: step 4: outside of the passes; is stopped (SIGSTOP)\n" in err
    assert last == "teratron: starting again from the newest checkpoint (restart 1 of 1)"
    (stacks,) = (tmp_path / "run" / "hangs").iterdir()
    assert "mesh.py" in stacks.read_text()
    (restart,) = events(tmp_path / "run", "restart")
    assert (restart["rank"], restart["cause"]) == (1, first.removeprefix("teratron: error: "))
    assert_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_torchrun_replaces_a_killed_worker_as_well(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    line = [argument for argument in command(text, tmp_path / "run") if argument != "--nproc=2"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "--", "teratron")
    strike(tmp_path, line, "SIGKILL", program=torchrun)
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2]
    assert_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_single_process_is_replaced_as_well(text: Path, tmp_path: Path) -> None:
    assert main(command(text, tmp_path / "alone", "--nproc=1")) == 0
    strike(tmp_path, command(text, tmp_path / "run", "--nproc=1", "--restarts=1"), "SIGKILL", rank=0)
    assert_undisturbed(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_a_rank_that_is_gone_for_good_leaves_the_others_to_the_same_end(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    err = strike(tmp_path, command(text, tmp_path / "run", "--restarts=2", "--min-nproc=1"), "SIGKILL", good=True)
    assert err.endswith("teratron: 2 processes came to no step 2 times in a row: going on with 1\n")
    assert [event["ranks"] for event in events(tmp_path / "run", "start") + events(tmp_path / "run", "resume")] == [2, 1]
    assert [event["cause"] for event in events(tmp_path / "run", "restart")] == [KILLED] * 3
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--restarts=-1"], "--restarts -1: expected how often"),
        (["--restarts=2", "--min-nproc=3"], "--min-nproc 3: expected the fewest processes to go on with, 1 to --nproc 2"),
        (["--min-nproc=1"], "--min-nproc 1 has no effect without restarts: add --restarts R"),
        (["--hang-timeout=-1"], "--hang-timeout -1: expected seconds"),
        (["--hang-timeout=nan"], "--hang-timeout nan: expected seconds"),
    ],
)
def test_what_cannot_be_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert main(command(text, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_restarts_are_torchruns_own_where_it_has_started_the_workers(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(command(text, tmp_path / "run", "--restarts=2")) == 2
    assert "--restarts 2: is for --nproc; leave it out" in capsys.readouterr().err
