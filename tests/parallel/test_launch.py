"""Launching: the first death ends a run at once and is told first, only a signal to the launcher saves, and no process is left."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from teratron.cli.main import main
from teratron.parallel.launch import _verdict, launch, own_command
from teratron.parallel.worker import DEFECT, LOST, STOPPED, USER, Record

SOON = 25
"""Seconds. It takes 1, or 5 where a rank hangs; more is for a busy machine. Elastic gives those that hang 30."""
LAUNCHER = "import sys; from teratron.parallel.launch import launch; sys.exit(launch(int(sys.argv[1]), sys.argv[2:]))"
WORKER = """
import os, sys
from pathlib import Path
from teratron.config import UserError
from teratron.parallel.worker import connect, disconnect, supervised, this_worker

does, folder = sys.argv[1], Path(sys.argv[2])
worker = this_worker()

def tell(name, text):
    draft = folder / f"{worker.rank}.draft"
    draft.write_text(str(text))
    draft.rename(folder / f"{name}-{worker.rank}")

def reduce(work=lambda step: None):
    import torch
    import torch.distributed as dist
    from teratron.train.interrupt import Interrupt
    connect(worker, torch.device("cpu"))
    with Interrupt() as interrupt:
        for step in range(10**9 if does == "reduce" else 3):
            total = torch.ones(())
            dist.all_reduce(total)
            if step == 0:
                tell("ready", os.getpid())
            work(step)
    tell("saved", int(total))
    disconnect()

def fail(step):
    if worker.rank == 1 and step == 1:
        print("last words", flush=True)
        raise ZeroDivisionError("of rank 1")

def stop():
    import time
    from teratron.train.interrupt import Interrupt
    with Interrupt() as interrupt:
        tell("ready", os.getpid())
        while does == "never stops" or not interrupt.asked:
            time.sleep(0.01)
    if worker.rank:  # the other has long gone
        other = Path("/proc") / (folder / "ready-0").read_text() / "stat"
        while other.exists() and other.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    tell("saved", os.getpid())
    return interrupt.asked

def run():
    match does:
        case "reduce" | "reduce three times":
            reduce()
        case "one raises":
            reduce(fail)
        case "one refuses" if worker.rank:
            raise UserError("a key is wrong")
        case "all refuse":
            raise UserError(f"a key is wrong:\\nin {folder.name}")
        case "stop" | "never stops":
            return stop()
        case "never listens" | "one refuses":
            tell("ready", os.getpid())
            while True:
                pass
        case "show":
            tell("terminal", " ".join(str(os.isatty(stream)) for stream in (0, 1, 2)))
            tell("threads", os.environ["OMP_NUM_THREADS"])
        case "lose" if worker.rank:
            raise RuntimeError("Connection closed by peer")
        case "lose":
            import time
            record = Path(os.environ["TERATRON_LAUNCHER"].partition(":")[2]) / "rank-1.json"
            while not record.exists() or time.time() < record.stat().st_mtime + 0.5:  # the launcher looks every 0.1 s
                pass
            raise ZeroDivisionError("of rank 0")
        case "leave":
            sys.exit(7)
    return 0

sys.exit(supervised(run))
"""


class Job:
    """A launcher of N workers in a process of its own; `pids` of the workers, by rank, once all are ready."""

    def __init__(self, folder: Path, does: str, nproc: int, command: tuple[str, ...] = (sys.executable, "-c", LAUNCHER)) -> None:
        self.folder, self.nproc = folder, nproc
        (folder / "worker.py").write_text(WORKER)
        arguments = [str(nproc)] if command[-1] == LAUNCHER else []
        line = [*command, *arguments, str(folder / "worker.py"), does, str(folder)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.process = subprocess.Popen(line, stdout=out, stderr=err, env=environment)

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def told(self, name: str) -> dict[int, str]:
        return {int(path.name.rpartition("-")[2]): path.read_text() for path in self.folder.glob(f"{name}-*")}

    def pids(self) -> dict[int, int]:
        until(lambda: len(self.told("ready")) == self.nproc or self.process.poll() is not None)
        assert self.process.poll() is None, self.err
        return {rank: int(pid) for rank, pid in self.told("ready").items()}

    def wait(self, seconds: float = 120) -> int:
        return self.process.wait(seconds)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a job in the test's folder; whatever is left of it is killed after the test."""
    jobs: list[Job] = []

    def begin(does: str, nproc: int = 2, **more: tuple[str, ...]) -> Job:
        jobs.append(Job(tmp_path, does, nproc, **more))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.process.kill()
        job.process.wait()
        for pid in job.told("ready").values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_the_run_in_seconds_and_is_the_only_one_named(start: Callable[..., Job], rank: int) -> None:
    job = start("reduce", 3)
    pids = job.pids()
    os.kill(pids[rank], signal.SIGKILL)
    assert job.wait(seconds=15) == 1
    assert job.err == f"teratron: error: rank {rank} was killed by SIGKILL (out of memory?); the other ranks were stopped\n"
    assert not any(map(alive, pids.values()))
    assert job.told("saved") == {}, "the others leave without saving"


def test_a_rank_that_hangs_is_killed_after_another_has_died(start: Callable[..., Job]) -> None:
    job = start("never listens")
    pids = job.pids()
    os.kill(pids[0], signal.SIGSTOP)
    os.kill(pids[1], signal.SIGKILL)
    assert job.wait(seconds=SOON) == 1
    assert job.err == "teratron: error: rank 1 was killed by SIGKILL (out of memory?); the other ranks were stopped\n"
    assert not any(map(alive, pids.values()))


def test_an_exception_is_told_once_with_its_traceback(start: Callable[..., Job]) -> None:
    job = start("one raises")
    assert job.wait() == 1
    first, _, trace = job.err.partition("\n")
    assert first == "teratron: error: rank 1 raised ZeroDivisionError: of rank 1; the other ranks were stopped"
    assert trace.startswith("Traceback")
    assert trace.endswith("ZeroDivisionError: of rank 1\n")
    assert trace.count("Traceback") == 1
    assert (job.folder / "out").read_text() == "last words\n"


def test_a_refusal_by_one_rank_says_which(start: Callable[..., Job]) -> None:
    job = start("one refuses")
    assert (job.wait(), job.err) == (2, "teratron: error: rank 1: a key is wrong\n")


def test_the_same_refusal_by_all_is_told_once(start: Callable[..., Job]) -> None:
    job = start("all refuse", 3)
    assert (job.wait(), job.err) == (2, f"teratron: error: a key is wrong: in {job.folder.name}\n")


def test_a_lost_connection_waits_for_the_error_behind_it(start: Callable[..., Job]) -> None:
    job = start("lose")
    assert job.wait() == 1
    assert job.err.startswith("teratron: error: rank 0 raised ZeroDivisionError: of rank 0; the other ranks were stopped\n")
    assert "peer" not in job.err


def test_an_exit_code_is_told(start: Callable[..., Job]) -> None:
    job = start("leave", 1)
    assert (job.wait(), job.err) == (1, "teratron: error: rank 0 exited with code 7\n")


def test_a_signal_to_the_launcher_lets_every_rank_save(start: Callable[..., Job]) -> None:
    """Rank 1 saves only after rank 0 has ended."""
    job = start("stop")
    pids = job.pids()
    job.process.terminate()
    assert job.wait() == 75
    assert job.told("saved").keys() == {0, 1}
    assert job.err == "\nSIGTERM: finishing this step, then saving (again = stop at once)\n"
    assert not any(map(alive, pids.values()))


def test_a_second_signal_stops_at_once(start: Callable[..., Job]) -> None:
    job = start("never stops")
    pids = job.pids()
    job.process.terminate()
    until(lambda: "finishing this step" in job.err)
    assert job.process.poll() is None
    job.process.terminate()
    assert job.wait(seconds=SOON) == 130
    assert job.err.endswith("teratron: interrupted\n")
    assert not any(map(alive, pids.values()))
    assert job.told("saved") == {}


def test_a_signal_stops_at_once_where_nobody_listens(start: Callable[..., Job]) -> None:
    """Even hanging ones."""
    job = start("never listens")
    pids = job.pids()
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    job.process.terminate()
    assert (job.wait(seconds=SOON), job.err) == (130, "teratron: interrupted\n")
    assert not any(map(alive, pids.values()))


def test_sigterm_to_a_worker_is_a_death_and_no_request(start: Callable[..., Job]) -> None:
    job = start("stop")
    os.kill(job.pids()[1], signal.SIGTERM)
    assert (job.wait(seconds=SOON), job.told("saved")) == (1, {})
    assert job.err == "teratron: error: rank 1 was killed by SIGTERM; the other ranks were stopped\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a dead process")
def test_a_killed_launcher_leaves_no_orphan(start: Callable[..., Job]) -> None:
    job = start("never listens")
    pids = job.pids()
    assert all(map(alive, pids.values()))
    job.process.kill()
    until(lambda: not any(map(alive, pids.values())), seconds=SOON)


def test_workers_have_the_terminal_but_ctrl_c_reaches_only_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    for does, code, key in (("show", 0, b""), ("stop", 130, b"\x03")):
        ours, theirs = pty.openpty()
        line = [sys.executable, "-c", LAUNCHER, "2", str(tmp_path / "worker.py"), does, str(tmp_path)]
        own = lambda: ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731 (it runs in the new process)
        environment = os.environ | {"OMP_NUM_THREADS": "3"}
        process = subprocess.Popen(
            line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own, env=environment
        )
        os.close(theirs)
        try:
            if key:
                until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
                os.write(ours, key)
            assert process.wait(120) == code
        finally:
            process.kill()
            os.close(ours)
    assert [(tmp_path / f"terminal-{rank}").read_text() for rank in (0, 1)] == ["True True True"] * 2
    assert (tmp_path / "threads-0").read_text() == "3", "what the user has set stays"
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_threads_are_shared_out(start: Callable[..., Job]) -> None:
    job = start("show", 2)
    assert job.wait() == 0
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert job.told("threads") == {0: str(share), 1: str(share)}


def test_torchrun_starts_the_same_worker(start: Callable[..., Job]) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone")
    job = start("reduce three times", command=torchrun)
    assert job.wait() == 0, job.err
    assert job.told("saved") == {0: "2", 1: "2"}


def test_arguments_arrive_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ["a$$b", "${local_rank}", "", "two words"]
    monkeypatch.setenv("EXPECTED", "|".join(odd))
    assert launch(1, ["-c", "import os, sys; sys.exit('|'.join(sys.argv[1:]) != os.environ['EXPECTED'])", *odd]) == 0


def test_own_command_finds_modules_as_this_process_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/usr/bin", *sys.path])
    assert own_command(["train"]) == ["-P", "-m", "teratron", "train"]
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    assert own_command(["train"]) == ["-m", "teratron", "train"]


def record(rank: int, kind: str, time: float, sentence: str = "x") -> dict[int, Record]:
    return {rank: Record(rank, kind, time, sentence, "Traceback\n" if kind in (DEFECT, LOST) else "")}


@pytest.mark.parametrize(
    ("failures", "records", "expected", "code"),
    [
        ({0: 1, 1: -9}, record(0, LOST, 1.0), "rank 1 was killed by SIGKILL (out of memory?); the other", 1),
        ({2: 1, 0: -15, 1: 1}, record(2, LOST, 1.0) | record(1, DEFECT, 2.0), "rank 1 raised x; the other", 1),
        ({0: 1, 1: 1}, record(0, DEFECT, 2.0) | record(1, DEFECT, 1.0), "rank 1 raised x; the other", 1),
        ({0: 1, 1: -15, 2: 1}, record(0, LOST, 2.0) | record(2, LOST, 1.0), "rank 2 raised x; the other", 1),
        ({1: -15, 0: -15}, {}, "rank 1 was killed by SIGTERM; the other", 1),
        ({1: -64, 0: -15}, {}, "rank 1 was killed by SIGRTMAX; the other", 1),
        ({1: 2, 0: 2}, record(0, USER, 1.0) | record(1, USER, 2.0), "ranks 0, 1: x", 2),
        ({1: 2, 0: 2}, record(0, USER, 2.0) | record(1, USER, 1.0, "y"), "rank 1: y", 2),
        ({0: -9}, record(1, STOPPED, 1.0), "rank 0 was killed by SIGKILL (out of memory?); the other", 1),
    ],
)
def test_the_first_cause_is_blamed(failures: dict[int, int], records: dict[int, Record], expected: str, code: int) -> None:
    message, found = _verdict(3, failures, records)
    assert message.startswith(f"teratron: error: {expected}")
    assert found == code


def test_a_reader_that_has_gone_is_no_error() -> None:
    assert _verdict(2, {0: 141, 1: -15}, {}) == ("", 141)


@pytest.mark.parametrize(
    ("nproc", "expected"), [("0", "--nproc 0: expected"), ("-2", "--nproc -2: expected"), ("x", "--nproc: invalid int")]
)
def test_impossible_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], nproc: str, expected: str) -> None:
    assert main(["train", "--run", str(tmp_path / "run"), "--nproc", nproc]) == 2
    assert expected in capsys.readouterr().err


def test_torchrun_and_another_number_do_not_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--run", str(tmp_path / "run"), "--nproc", "2"]) == 2
    assert "--nproc 2: torchrun or srun has started 4 processes" in capsys.readouterr().err


def test_the_command_starts_workers_that_refuse_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["train", "--run", str(tmp_path / "run"), "--nproc", "2", "--device", "tpu"]
    assert main(line) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"teratron: error: [^\n]*tpu[^\n]*\n", err), err


def test_help_does_not_load_the_launcher() -> None:
    code = "import sys; from teratron.cli.main import main; main(['--help']); sys.exit('teratron.parallel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
