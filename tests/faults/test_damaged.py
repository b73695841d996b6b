"""Checkpoints that were harmed on the disk: named, passed over, and the same numbers come out, bit for bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from struck import Runs

from teratron.train.history import read_history

pytestmark = pytest.mark.xdist_group("ranks")

FILES = ("manifest.json", "COMPLETE", "rank-00000.safetensors", "rank-00001.safetensors", "tokenizer/tokenizer.json")
HARMS = ("flip", "cut", "empty", "remove")
QUICK = {("manifest.json", "flip"), ("rank-00001.safetensors", "flip"), ("rank-00000.safetensors", "cut"), ("COMPLETE", "remove")}


def harm(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    match how:
        case "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: len(content) * 2 // 3])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()


@pytest.fixture
def run(forks: Runs, half: Path) -> Path:
    """A copy of the run that was killed in step 7."""
    shutil.copytree(half, forks.folder / "run")
    return forks.folder / "run"


CASES = [(file, how) for file in FILES for how in HARMS]


@pytest.mark.parametrize(("file", "how"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES])
def test_a_harmed_checkpoint_is_named_and_the_one_before_is_gone_on_from(
    forks: Runs, run: Path, undisturbed: Path, file: str, how: str
) -> None:
    folder = run / "checkpoints" / "step-00000006"
    file = next(str(path.relative_to(folder)) for path in folder.rglob("*.json") if path.parent != folder) if "/" in file else file
    harm(folder / file, how)
    end = forks.assert_goes_on("run", 4, undisturbed)
    (told,) = [line for line in end.text.splitlines() if "damaged checkpoint" in line]
    assert str(folder) in told
    assert Path(file).name in told or file == "COMPLETE"


def test_nothing_is_begun_again_when_all_are_harmed(forks: Runs, run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        harm(folder / "rank-00001.safetensors", "flip")
    end = forks.train("run")
    assert end.codes == [2, 2]
    assert f"{run}: no good checkpoint is left (3 damaged); start again in another --run folder" in end.text
    assert forks.saved("run") == [2, 4, 6]


@pytest.mark.slow
def test_checkpoints_that_were_removed_are_missed(forks: Runs, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    end = forks.train("run")
    assert end.codes == [2, 2]
    assert "metrics.jsonl says that step 6 was saved" in end.text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["empty", "remove"])
def test_a_lost_config_is_made_again_from_the_checkpoint(forks: Runs, run: Path, undisturbed: Path, how: str) -> None:
    harm(run / "config.toml", how)
    forks.assert_goes_on("run", 6, undisturbed)


@pytest.mark.slow
def test_half_a_line_of_metrics_is_no_event(forks: Runs, run: Path, undisturbed: Path) -> None:
    """As a machine leaves it that loses its power while it writes."""
    path = run / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 20)
    forks.assert_goes_on("run", 6, undisturbed)
    assert read_history(path).unreadable == 1
