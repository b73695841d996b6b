"""Other services get the curves, and whatever they do, the run goes on: stand-ins for their packages raise, hang and fall behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import events, losses, tiny, write_text

from teratron.config import Config, UserError
from teratron.train import Trainer, sinks
from teratron.train.sinks import Sink, check_sinks

WANDB = """
import json, os
from pathlib import Path

class Run:
    id = "abc"
    def __init__(self, options):
        self.file = (Path(options["dir"]) / "received").open("a")
        self.note("init", options["project"], options["name"], options["id"])
    def note(self, *what):
        self.file.write(json.dumps(what) + "\\n")
        self.file.flush()
    def log(self, values, step):
        self.note("log", values, step)
    def finish(self):
        self.note("finish")

def init(**options):
    return Run(options)
"""
MLFLOW = """
import json, os
from pathlib import Path

class Info:
    run_id = "abc"
class Run:
    info = Info()
def note(*what):
    with Path(os.environ["RECEIVED"]).open("a") as file:
        file.write(json.dumps(what) + "\\n")
def set_experiment(name):
    note("experiment", name)
def start_run(run_id=None, run_name=None):
    note("init", run_id, run_name)
    return Run()
def log_metrics(values, step):
    note("log", values, step)
def end_run():
    note("finish")
"""


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a package of that name where processes started from here find it."""

    def planted(name: str, source: str) -> None:
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
        monkeypatch.syspath_prepend(tmp_path / "packages")

    return planted


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1.0 / number, "lr": 1e-3, "terms": {}}


def received(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_sends_its_curves_and_goes_on_with_the_same_entry(tmp_path: Path, plant: Any) -> None:
    plant("wandb", WANDB)
    run = tmp_path / "run"
    text = write_text(tmp_path / "text.txt")
    Trainer(tiny(text, log__wandb="project"), run, device="cpu", echo=False).train()
    first, *middle, last = received(run / "received")
    assert (first, last) == (["init", "project", "run", None], ["finish"])
    assert {number: values["train/loss"] for _, values, number in middle if "train/loss" in values} == losses(run)
    evals = {event["step"]: event["loss"] for event in events(run, "eval")}
    assert {number: values["eval/loss"] for _, values, number in middle if "eval/loss" in values} == evals
    Trainer(tiny(text, log__wandb="project", train__steps=7), run, device="cpu", echo=False).train()
    assert ["init", "project", "run", "abc"] in received(run / "received")


def test_mlflow_gets_the_same(tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("mlflow", MLFLOW)
    monkeypatch.setenv("RECEIVED", str(tmp_path / "received"))
    for known in (None, "abc"):
        sink = Sink("mlflow", "experiment", tmp_path, print)
        sink.write(step(1))
        sink.write({"event": "save", "step": 1})
        sink.close()
        named = ["init", known, None if known else tmp_path.name]
        log = ["log", {"train/loss": 1.0, "train/lr": 1e-3}, 1]
        assert received(tmp_path / "received")[-4:] == [["experiment", "experiment"], named, log, ["finish"]]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def init(**options): raise RuntimeError('no such project')", "RuntimeError: no such project"),
        ("raise ImportError('half installed')", "ImportError: half installed"),
        ("import os\nos._exit(3)", "its process has ended"),
    ],
)
def test_a_package_that_fails_is_told_once(tmp_path: Path, plant: Any, source: str, said: str) -> None:
    plant("wandb", source)
    told: list[str] = []
    sink = Sink("wandb", "project", tmp_path, told.append)
    sink._process.wait()
    for number in range(1, 10):
        sink.write(step(number))
    sink.close()
    assert len(told) == 1
    assert said in told[0]
    assert "metrics.jsonl has everything" in told[0]


def test_a_package_that_hangs_holds_nothing_up(tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("wandb", "import signal\ndef init(**options): signal.pause()")
    monkeypatch.setattr(sinks, "PATIENCE", 0.2)
    told: list[str] = []
    sink = Sink("wandb", "project", tmp_path, told.append)
    for number in range(1, 2000):
        sink.write(step(number))
    sink.close()
    assert len(told) == 1
    assert "did not take everything within 0.2 s" in told[0]
    assert sink._process.returncode == -signal.SIGKILL


def test_a_process_that_reads_nothing_loses_events_and_blocks_nobody(tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("wandb", WANDB)
    monkeypatch.setattr(sinks, "PATIENCE", 0.2)
    told: list[str] = []
    sink = Sink("wandb", "project", tmp_path, told.append)
    os.kill(sink._process.pid, signal.SIGSTOP)
    for number in range(1, 5000):
        sink.write(step(number))
    assert sink._dropped > 0
    sink.close()
    assert len(told) == 1
    assert sink._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_before_the_first_step(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"log\.{service} = mine, but the package is not installed: pip install {service}"):
        check_sinks(Config().override({f"log.{service}": "mine"}).log)
    check_sinks(Config().log)
