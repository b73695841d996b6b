"""A sweep's course, with a stand-in for `teratron train` that needs no torch: rounds, failures, stops, machines; at last a real one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import KEYS, assert_same_state, losses, tiny, write_text

from teratron.cli.main import main
from teratron.config import Config, UserError
from teratron.tasks import sweep, sweep_jobs
from teratron.tasks.sweep import Plan, Sweep
from teratron.tasks.sweep_jobs import Slot, slots_of

STEPS = 9
STAND_IN = """
import json, os, pathlib, signal, sys, time, tomllib
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
keys = dict(argument[2:].split("=", 1) for argument in sys.argv if argument.startswith("--") and "=" in argument)
lr, stop = float(keys["optim.lr"]), STEPS
if (run / "live.toml").is_file():
    stop = tomllib.loads((run / "live.toml").read_text())["stop_step"]
events = (run / "metrics.jsonl").open("a")
def tell(event, **values):
    events.write(json.dumps({"event": event, **values}) + chr(10))
    events.flush()
signal.signal(signal.SIGTERM, lambda *_: (tell("end"), sys.exit(75)))
print("trained on", os.environ.get("OMP_NUM_THREADS"), os.environ.get("MACHINE", "here"))
if lr == 3:
    tell("bad_numbers", step=1)
    print("teratron: error: the loss is nan")
    sys.exit(2)
if lr == 4:
    sys.exit(1)
for step in range(1, stop + 1):
    tell("step", step=step, loss=lr + 1 / step, seconds=0.5)
while lr == 5 and not pathlib.Path(run.parent, "go").exists():
    time.sleep(0.01)
if lr != 6:
    tell("eval", step=stop, loss=abs(lr - 1.5) if stop == STEPS else lr)
""".replace("STEPS", str(STEPS))
"""Held-out losses that put the lowest rate first, and at the last step the one next to 1.5. Rates 3 to 6 are troubles of four kinds."""


@pytest.fixture
def base(tmp_path: Path) -> Config:
    return tiny(write_text(tmp_path / "text.txt"), train__steps=STEPS)


@pytest.fixture
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sweep_jobs, "own_command", lambda arguments: [str(script), *arguments])
    monkeypatch.setattr(sweep, "PERIOD", 0.01)


def swept(
    base: Config, folder: Path, *over: str, slots: int = 2, show: Callable[[], None] = lambda: None, **known: Any
) -> tuple[Sweep, int]:
    plan = Plan(base, over, **{"method": "grid", "trials": 0} | known)
    made = Sweep(plan, folder, [Slot()] * slots)
    try:
        return made, made.run(lambda line: None, show)
    finally:
        made.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("_stand_in")
def test_a_grid_trains_every_trial_once_and_tells_the_best(base: Config, tmp_path: Path) -> None:
    made, code = swept(base, tmp_path / "sweep", "optim.lr=0.5,1,2,8")
    assert code == 0
    assert sorted((one["trial"], one["step"]) for one in lines(made.folder)) == [(trial, STEPS) for trial in range(4)]
    assert made.best_first(range(4)) == [1, 2, 0, 3], "equally good ones in order"
    assert "trial 1 (optim.lr = 1)" in made.write_best()
    assert Config.load(made.folder / "best.toml") == base.override({"optim.lr": 1})
    page = (made.folder / "sweep.html").read_text()
    assert page.count('<path class="trial') == 4
    assert "4 of 4 trials came through" in page


@pytest.mark.usefixtures("_stand_in")
def test_halving_lets_the_best_go_on_and_stops_the_others(base: Config, tmp_path: Path) -> None:
    made, _ = swept(base, tmp_path / "sweep", "optim.lr=9,8,7.5,7,2,1,0.5,0.25,0.1", method="halving")
    assert [(count, step) for count, step in made.rounds] == [(9, 1), (3, 3), (1, 9)]
    assert sorted(one["trial"] for one in lines(made.folder) if one["step"] == 1) == list(range(9))
    assert sorted(one["trial"] for one in lines(made.folder) if one["step"] == 3) == [6, 7, 8]
    assert [one["trial"] for one in lines(made.folder) if one["step"] == 9] == [8]
    assert made.best() == 8
    stops = {path.parent.name: path.read_text() for path in made.folder.glob("trial-*/live.toml")}
    assert stops["trial-006"] == "stop_step = 3\n"
    assert "trial-008" not in stops, "that went on to its end"


@pytest.mark.usefixtures("_stand_in")
def test_a_trial_that_fails_is_noted_with_its_reason_and_the_others_go_on(base: Config, tmp_path: Path) -> None:
    made, code = swept(base, tmp_path / "sweep", "optim.lr=3,4,6,1")
    found = {one["trial"]: (one["state"], one["reason"]) for one in lines(made.folder)}
    assert code == 0
    assert found[0] == ("diverged", "the loss is nan")
    assert found[1][0] == "failed"
    assert found[2][0] == "failed"
    assert "no valid_loss at step 9: expected held-out data" in found[2][1]
    assert found[3] == ("done", "")
    assert made.best() == 3
    swept(base, made.folder, "optim.lr=3,4,6,1")
    again = [one["trial"] for one in lines(made.folder)][4:]
    assert sorted(again) == [1, 2], "what failed is tried again; what diverged, or is done, is not"


@pytest.mark.usefixtures("_stand_in")
def test_a_sweep_without_a_good_trial_says_why(base: Config, tmp_path: Path) -> None:
    made, _ = swept(base, tmp_path / "sweep", "optim.lr=3")
    with pytest.raises(UserError, match="no trial came to its end: the loss is nan"):
        made.write_best()


@pytest.mark.usefixtures("_stand_in")
def test_the_first_signal_has_all_children_save_and_the_same_command_goes_on(base: Config, tmp_path: Path) -> None:
    folder, made = tmp_path / "sweep", []

    def interrupt() -> None:
        begun = [path for path in folder.glob("trial-*/metrics.jsonl") if '"step"' in path.read_text()]
        if len(begun) == 2 and not made:
            made.append(os.kill(os.getpid(), signal.SIGINT))

    _, code = swept(base, folder, "optim.lr=5,5.0,1", show=interrupt)
    assert code == 130
    assert [(folder / f"trial-00{trial}/metrics.jsonl").read_text().count('"end"') for trial in (0, 1)] == [1, 1]
    assert not (folder / "trial-002").exists(), "nothing was begun any more"
    (folder / "go").touch()
    _, code = swept(base, folder, "optim.lr=5,5.0,1")
    assert code == 0
    assert sorted(one["trial"] for one in lines(folder)) == [0, 1, 2]


@pytest.mark.usefixtures("_stand_in")
def test_what_is_done_is_not_trained_again(base: Config, tmp_path: Path) -> None:
    made, _ = swept(base, tmp_path / "sweep", "optim.lr=0.5,1")
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("metrics.jsonl")}
    swept(base, tmp_path / "sweep", "optim.lr=0.5,1")
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.rglob("metrics.jsonl")}


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize(
    ("keys", "over", "known", "sentence"),
    [
        ({"optim.beta1": 0.5}, "optim.lr=0.5,1", {}, "optim.beta1 = 0.9, now 0.5"),
        ({}, "optim.lr=0.5,2", {}, r"--over = \['optim.lr=0.5,1'\], now \['optim.lr=0.5,2'\]"),
        ({}, "optim.lr=0.5,1", {"metric": "loss"}, "--metric = 'valid_loss', now 'loss'"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(
    base: Config, tmp_path: Path, keys: dict[str, Any], over: str, known: dict[str, Any], sentence: str
) -> None:
    swept(base, tmp_path / "sweep", "optim.lr=0.5,1")
    with pytest.raises(UserError, match=sentence):
        swept(base.override(keys), tmp_path / "sweep", over, **known)


@pytest.mark.usefixtures("_stand_in")
def test_trials_run_on_other_machines_through_ssh(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nshift 2\nexport MACHINE=$1\nshift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    plan = Plan(base, ("optim.lr=0.5,1,2,2.5",), "grid", 0)
    made = Sweep(plan, tmp_path / "sweep", slots_of(["one", "two"], 1, 1, "cpu", 8))
    assert made.run(lambda line: None, lambda: None) == 0
    made.close()
    logs = [path.read_text() for path in sorted(made.folder.glob("trial-*.log"))]
    assert {line for log in logs for line in log.splitlines() if line.startswith("trained")} == {"trained on 3 one", "trained on 3 two"}


def test_cores_and_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert slots_of([], 3, 1, "cpu", 8) == [Slot("", 2)] * 3
    assert slots_of(["a", "b"], 2, 2, "cuda", 8) == [Slot(name, 0, devices) for devices in ("0,1", "2,3") for name in ("a", "b")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert slots_of([], 2, 2, "cuda", 8) == [Slot("", 2, "4,5"), Slot("", 2, "6,7")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--over is missing"),
        (["--over", "optim.lr=1,2", "--optim.lr", "3"], "--optim.lr is given too"),
        (["--over", "optim.lr=1,2", "--over", "optim.lr=3,4"], "--over optim.lr: is given twice"),
        (["--over", "optim.lr=1,2", "--method", "random"], "add --trials N"),
        (["--over", "optim.lr=1,2", "--method", "grid", "--trials", "3"], "tries all combinations"),
        (["--over", "optim.lr=1,2", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["--over", "optim.lr=1,2", "--eta", "1"], "--eta 1: expected at least 2"),
        (["--over", "optim.name=adamw,adamww"], "trial 1 of 2 (optim.name = adamww): optim.name = 'adamww': expected one of"),
        (["--over", "train.steps=10,20", "--method", "halving"], "--over train.steps: halving compares"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["sweep", "--run", str(tmp_path / "sweep"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_trial_of_a_halving_is_the_run_that_was_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training, through the command line, data prepared once for all."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = write_text(tmp_path / "text.txt")
    keys = [
        f"--{name}={str(value).lower()}" for name, value in (KEYS | {"data.text": text, "train.steps": STEPS}).items() if name != "optim.lr"
    ]
    assert main(["sweep", *keys, "--run", str(tmp_path / "sweep"), "--over=optim.lr=1e-4,1e-2,3e-2", "--method=halving", "--jobs=2"]) == 0
    (last,) = [one for one in lines(tmp_path / "sweep") if one["step"] == STEPS]
    assert len(lines(tmp_path / "sweep")) == 4
    best = tmp_path / "sweep" / f"trial-{last['trial']:03d}"
    monkeypatch.setattr("teratron.train.trainer.measure_peak", lambda device, dtype: 1e11)
    assert main(["train", str(tmp_path / "sweep" / "best.toml"), "--run", str(tmp_path / "alone"), "--device=cpu"]) == 0
    assert_same_state(tmp_path / "alone", best)
    assert losses(tmp_path / "alone") == losses(best)
    assert not (best / "data").exists()
