"""Command lines that messages suggest start with what the user's shell can run."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from teratron.train import commands
from teratron.train.commands import program


@pytest.mark.parametrize(
    ("on_path", "started", "expected"),
    [
        ("/usr/bin/teratron", ".venv/bin/teratron", "teratron"),
        (None, ".venv/bin/teratron", ".venv/bin/teratron"),
        (None, "/my code/bin/teratron", "'/my code/bin/teratron'"),
    ],
)
def test_the_installed_script(monkeypatch: pytest.MonkeyPatch, on_path: str | None, started: str, expected: str) -> None:
    monkeypatch.setattr(commands.shutil, "which", lambda name: on_path)
    monkeypatch.setattr(sys, "argv", [started, "train"])
    assert program() == expected


@pytest.mark.parametrize("started", ["/src/teratron/__main__.py", "train_mine.py", ""])
def test_from_elsewhere_the_module_is_called(monkeypatch: pytest.MonkeyPatch, started: str) -> None:
    monkeypatch.setattr(commands.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", [started])
    done = subprocess.run([*shlex.split(program()), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("teratron ")
