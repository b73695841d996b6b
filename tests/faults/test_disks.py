"""Disks that fill up, go away or may not be written to: all ranks stop with one sentence, and the run goes on once it is put right."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import EVERY, SETUP, End, blow
from struck import Runs

pytestmark = pytest.mark.xdist_group("ranks")

STEP = "teratron.train.engine:Engine.step"
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))"
ORDINARY = "import ctypes; assert not ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())"
"""From now on permissions hold for the superuser as well."""


def assert_all_say(end: End, sentence: str) -> None:
    assert end.codes == [2, 2], end.text
    for said in end.said:
        assert sentence in said
        assert said.count("teratron: error:") == 1


def test_a_rank_that_may_write_no_more_stops_all(forks: Runs, undisturbed: Path) -> None:
    end = forks.train("run", blow(1, STEP, 5, SMALL_FILES))
    assert_all_say(end, "checkpoints: larger than a file may be here (ulimit -f): a checkpoint needs")
    assert forks.saved("run") == [2, 4]
    forks.assert_goes_on("run", 4, undisturbed)


@pytest.mark.slow
def test_beside_training_as_well(forks: Runs, undisturbed: Path) -> None:
    keys = {"checkpoint__asynchronous": True}
    end = forks.train("run", blow(1, STEP, 5, SMALL_FILES), **keys)
    assert_all_say(end, "checkpoints: larger than a file may be here (ulimit -f): a checkpoint needs")
    newest = forks.saved("run")[-1]
    assert newest in (2, 4), "that of step 4 may still have been written when it came"
    forks.assert_goes_on("run", newest, undisturbed, **keys)


@pytest.fixture
def disk(tmp_path: Path, text: Path) -> Iterator[Runs]:
    """Runs; in the folder `disk` is a disk of 4 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only the superuser may mount a small disk: a real disk that is full is not tested")
    yield Runs(tmp_path, text)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_disk_that_is_full(disk: Runs, undisturbed: Path, step: int) -> None:
    """Rank 0 says so, whether it was to write the metrics or a checkpoint."""
    fill = "file = open(f'{folder}/disk/filler', 'wb', 0)\ntry:\n    while file.write(bytes(4096)): pass\nexcept OSError: pass"
    end = disk.train("disk/run", blow(0, STEP, step, fill))
    assert end.codes[0] == 2, end.text
    assert "earlier checkpoints are intact; free space" in end.said[0]
    (disk.folder / "disk" / "filler").unlink()
    disk.assert_goes_on("disk/run", step - 1, undisturbed)


@pytest.mark.parametrize("how", ["shutil.rmtree({0!r})", pytest.param("os.rename({0!r}, {0!r} + '-moved')", marks=pytest.mark.slow)])
def test_a_run_directory_that_goes_away(forks: Runs, undisturbed: Path, how: str) -> None:
    deed = f"import shutil; {how.format(str(forks.folder / 'run'))}"
    end = forks.train("run", blow(0, STEP, 5, deed))
    assert_all_say(end, f"{forks.folder / 'run'}: was removed or moved while it was being trained: its checkpoints cannot be written")
    forks.assert_goes_on("run", 0, undisturbed)


@pytest.mark.parametrize(
    ("rank", "deed"),
    [
        pytest.param(EVERY, "os.chmod(folder + '/run/checkpoints', 0o555)", id="of checkpoints"),
        pytest.param(1, "os.umask(0o222)", id="of one checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_directory_that_may_not_be_written_to(forks: Runs, undisturbed: Path, rank: int, deed: str) -> None:
    folder = forks.folder / "run" / "checkpoints"
    end = forks.train("run", blow(rank, SETUP, deed=ORDINARY), blow(0, STEP, 5, deed))
    folder.chmod(0o755)
    assert_all_say(end, f"{folder / 'step-00000006'}: cannot write the checkpoint: Permission denied; earlier checkpoints are intact")
    forks.assert_goes_on("run", 4, undisturbed)


def test_a_slow_rank_is_named(forks: Runs) -> None:
    """Slow by work of its own, so that a busy machine makes it slower still."""
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    end = forks.train("run", *(blow(1, STEP, step, busy) for step in range(1, 9)))
    assert end.codes == [0, 0], end.text
    assert "rank 1 is slow: its own work takes " in end.said[0]
