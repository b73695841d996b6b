"""Runs of two ranks that tests of faults strike, and one that is never struck."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import EVERY, blow, counted
from struck import Runs
from tiny import write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is never struck; beside it `calls-RANK`, the function calls that each rank has made."""
    runs = Runs(tmp_path_factory.mktemp("undisturbed"), text)
    end = runs.train("run", *(counted(rank, runs.folder / f"calls-{rank}") for rank in range(2)))
    assert end.codes == [0, 0], end.text
    return runs.folder / "run"


@pytest.fixture(scope="session")
def half(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose ranks were all killed at once in step 7: its checkpoints are of the steps 2, 4 and 6."""
    runs = Runs(tmp_path_factory.mktemp("half"), text)
    assert runs.train("run", blow(EVERY, "teratron.train.engine:Engine.step", 7)).codes == [-9, -9]
    return runs.folder / "run"


@pytest.fixture
def forks(tmp_path: Path, text: Path) -> Runs:
    return Runs(tmp_path, text)
