"""`teratron train` from outside: starts fast, stops on Ctrl-C with a checkpoint and a word, goes on with the same command."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import assert_same_state, events, losses, options, state, write_text

from teratron.cli.main import main
from teratron.config import Config
from teratron.parallel.worker import ENDING
from teratron.train import trainer
from teratron.train.commands import program
from teratron.train.engine import Engine


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture(autouse=True)
def _assumed_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "measure_peak", lambda device, dtype: 1e11)


def command(text: Path, run: Path, **keys: object) -> list[str]:
    return ["train", *options(data__text=text, **keys), "--run", str(run), "--device", "cpu"]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do something within the number-th step that this process makes."""
    step, made = Engine.step, 0

    def stepped(*args: object, **kwargs: object) -> object:
        nonlocal made
        made += 1
        if made == number:
            action()
        return step(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "step", stepped)


def test_text_in_a_trained_model_out(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(text, tmp_path / "run")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    config = Config.load(tmp_path / "run")
    assert config.describe() in out, "the effective config is printed"
    assert "step 6: held-out loss" in out
    assert out.splitlines()[-1].startswith("done: 6 steps; report in ")
    for name in ("config.toml", "metrics.jsonl", "report.html", "tokenizer/chars.json", "checkpoints/step-00000006/COMPLETE"):
        assert (tmp_path / "run" / name).is_file()


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 75, "preempted"),
        (signal.SIGUSR1, 75, "preempted"),
        (signal.SIGUSR2, 75, "preempted"),
    ],
)
def test_a_signal_saves_says_how_to_go_on_and_the_same_command_does(
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    reason: str,
) -> None:
    assert main(command(text, tmp_path / "plain")) == 0
    handlers = [signal.getsignal(n) for n in ENDING]
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        assert main(command(text, tmp_path / "run")) == code
    out, err = capfd.readouterr()
    assert f"stopped at step 3 of 6; to go on: {program()} train --run {tmp_path / 'run'}" in out
    assert f"{number.name}: finishing this step, then saving" in err
    assert [signal.getsignal(n) for n in ENDING] == handlers
    assert [event["reason"] for event in events(tmp_path / "run", "end")] == [reason]
    assert main(["train", "--run", str(tmp_path / "run"), "--device", "cpu"]) == 0, "as it said"
    assert_same_state(tmp_path / "plain", tmp_path / "run")
    assert losses(tmp_path / "plain") == losses(tmp_path / "run")


def test_a_signal_in_the_last_step_is_no_interruption(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(command(text, tmp_path / "run")) == 0
    assert len(state(tmp_path / "run")) > 0


def test_a_second_signal_stops_at_once_and_loses_no_checkpoint(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_step(patch, 5, twice)
        assert main(command(text, tmp_path / "run", checkpoint__asynchronous=False)) == 130
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert main(command(text, tmp_path / "run", checkpoint__asynchronous=False)) == 0
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]


def test_a_signal_saves_though_nobody_reads_any_more(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the `tee` behind a run first: the answer to the signal then finds no reader."""

    def alone() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        former = os.dup(2)
        os.dup2(writer, 2)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.dup2(former, 2)
            os.close(former)
            os.close(writer)

    at_step(monkeypatch, 5, alone)
    assert main(command(text, tmp_path / "run")) == 130
    assert [event["step"] for event in events(tmp_path / "run", "save")][-1] == 5


@pytest.mark.parametrize("others", [(signal.SIGUSR1, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR2)])
def test_a_scheduler_that_repeats_itself_does_not_cut_the_save_short(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: tuple[signal.Signals, ...]
) -> None:
    at_step(monkeypatch, 5, lambda: [os.kill(os.getpid(), number) for number in others])
    assert main(command(text, tmp_path / "run")) == 75
    assert [event["step"] for event in events(tmp_path / "run", "save")][-1] == 5


def test_a_run_stops_by_itself_after_its_time_and_goes_on_to_the_same_end(text: Path, tmp_path: Path) -> None:
    """Of the least time there is: the first step ends after it."""
    assert main(command(text, tmp_path / "plain")) == 0
    assert main(command(text, tmp_path / "run", train__stop_after=1e-9)) == 75
    assert [(event["step"], event["reason"]) for event in events(tmp_path / "run", "end")] == [(1, "preempted")]
    assert main(command(text, tmp_path / "run", train__stop_after=0)) == 0, "the key may change when a run goes on"
    assert_same_state(tmp_path / "plain", tmp_path / "run")


def test_a_real_process_starts_fast_and_obeys_ctrl_c(text: Path, tmp_path: Path) -> None:
    """Processor time of a whole process until it has been stopped after its first step: under 6 s is promised for the first step."""
    run = tmp_path / "a run"
    line = [sys.executable, "-m", "teratron", *command(text, run, train__steps=10**6, log__every=1, log__tensorboard=True)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(shown.startswith("step") and "tokens/s" in shown for shown in process.stdout)
        process.send_signal(signal.SIGINT)
        rest, complaint = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 130, complaint
    assert f"to go on: {program()} train --run '{run}'" in rest
    assert "Traceback" not in complaint
    assert usage.ru_utime + usage.ru_stime < 9, "seconds; most is the import of torch"
    step = events(run, "end")[0]["step"]
    assert main(["train", "--run", str(run), "--train.steps", str(step + 2), "--device", "cpu"]) == 0


def test_importing_the_package_adds_nothing_to_torch() -> None:
    code = "import time, torch; start = time.process_time(); import teratron; teratron.Config; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def test_a_finished_run_says_so(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(text, tmp_path / "run")) == 0
    capsys.readouterr()
    assert main(command(text, tmp_path / "run")) == 0
    out, err = capsys.readouterr()
    assert "is complete: step 6 of 6; to train on: --train.steps N" in out
    assert err == ""


def test_a_preset_and_keys_over_it(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*options(data__text=text, train__steps=2, optim__warmup_steps=1), "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", "shakespeare-char", *keys]) == 0
    config = Config.load(tmp_path / "run")
    assert (config.optim.beta2, config.train.steps) == (0.99, 2)
    assert main(["train", "shakespeare-char", *keys]) == 0, "the same command"


def test_branching_off_and_going_on_there(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(text, tmp_path / "old")) == 0
    branch = ["train", "--run", str(tmp_path / "old"), "--fork", str(tmp_path / "new"), "--optim.lr=0.001", "--device", "cpu"]
    assert main([*branch, "--train.steps=8"]) == 0
    assert f"continuing {tmp_path / 'new'} from step 6" in capsys.readouterr().out
    assert main([*branch, "--train.steps=9"]) == 0
    assert f"continuing {tmp_path / 'new'} from step 8" in capsys.readouterr().out
    assert (Config.load(tmp_path / "old").optim.lr, Config.load(tmp_path / "new").optim.lr) == (1e-2, 1e-3)


def refused(capfd: pytest.CaptureFixture[str], line: list[str]) -> str:
    """The one line of error, when the command ends as it should."""
    capfd.readouterr()
    assert main(line) == 2
    err = capfd.readouterr().err
    assert err.startswith("teratron: error: ")
    assert err.count("\n") == 1, err
    return err


def test_a_file_too_large_while_saving_keeps_the_former_checkpoint(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses in the middle of the file, as on a full disk; afterwards the same command goes on."""
    line = command(text, tmp_path / "run", model__hidden=64, checkpoint__asynchronous=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
        try:
            message = refused(capfd, line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "larger than a file may be here" in message
    assert "run the same command again" in message
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000002"]
    assert main(line) == 0
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_while_saving_keeps_the_former_checkpoint(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        # 0.6 MB a checkpoint, all kept: there is room for a few.
        message = refused(capfd, command(text, disk / "run", model__hidden=64, checkpoint__keep=0, train__steps=40))
        assert "disk full" in message
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert len(kept) >= 2
        assert all(name.startswith("step-") for name in kept), "nothing half-written"
        assert len(state(disk / "run")) > 0
        for name in kept[:-1]:
            shutil.rmtree(disk / "run" / "checkpoints" / name)
        line = ["train", "--run", str(disk / "run"), "--checkpoint.keep=1", "--device", "cpu"]
        assert main(line) == 0
        (resumed,) = events(disk / "run", "resume")
        assert f"step-{resumed['step']:08d}" == kept[-1]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_room_for_a_checkpoint_is_said_before_the_first_step(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 2**20

    with monkeypatch.context() as patch:
        patch.setattr("teratron.checkpoint.format.shutil.disk_usage", lambda path: Usage)
        assert "disk full" in refused(capfd, command(text, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(command(text, tmp_path / "run")) == 0


def test_metrics_that_cannot_be_written_are_one_line(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, event: str, **values: object) -> None:
        with self._reporting():  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("teratron.train.trainer.Metrics.write", full)
    assert "metrics cannot be written: No space left on device" in refused(capfd, command(text, tmp_path / "run"))
