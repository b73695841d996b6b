"""Checkpoints in the machine's memory: found by the run that left them, and by no other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from teratron.checkpoint import memory
from teratron.checkpoint.memory import make_memory_folder, memory_folder, remove_memory
from teratron.config import UserError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(memory, "PLACE", folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_it_is_found_again_and_is_nobody_elses(run: Path, tmp_path: Path) -> None:
    assert memory_folder(run) is None
    folder = make_memory_folder(run, 10)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert memory_folder(run) == folder == make_memory_folder(run, 10)
    (tmp_path / "other").mkdir()
    assert memory_folder(tmp_path / "other") is None


def test_a_run_begun_anew_finds_nothing_and_removes_what_was_left(run: Path, place: Path) -> None:
    old = make_memory_folder(run, 10)
    shutil.rmtree(run)
    run.mkdir()
    assert memory_folder(run) is None
    assert make_memory_folder(run, 10) != old
    assert len(os.listdir(place)) == 1


def test_nothing_is_left_after_removal(run: Path, place: Path) -> None:
    (make_memory_folder(run, 10) / "file").write_text("x")
    remove_memory(run)
    assert os.listdir(place) == []
    assert memory_folder(run) is None


def test_what_is_too_large_is_refused_and_what_lies_there_counts_as_free(run: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_memory_folder(run, 10)
    (folder / "old").write_bytes(bytes(2**20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2**20))  # type: ignore[attr-defined]
    assert make_memory_folder(run, 2**20) == folder
    with pytest.raises(UserError, match=r"checkpoint\.memory_every: two checkpoints of 2 MiB do not fit into .*shm, where 2 MiB are free"):
        make_memory_folder(run, 2**21)


def test_a_machine_without_such_a_place_is_refused(run: Path, place: Path) -> None:
    place.rmdir()
    with pytest.raises(UserError, match=r"checkpoint\.memory_every: there is no .*shm on this machine"):
        make_memory_folder(run, 10)


def test_a_note_of_rubbish_is_nothing(run: Path) -> None:
    for text in (b"", b"\xff\xfe", b"../../etc", b"x\0y"):
        (run / memory.NOTE).write_bytes(text)
        assert memory_folder(run) is None
