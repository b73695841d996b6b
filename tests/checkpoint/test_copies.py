"""Copies of checkpoints in a second place: the same bytes, read back, found again; what cannot be copied or fetched is said."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
import torch
from held import whole_pieces
from tiny import tiny

from teratron.checkpoint import Checkpoint, TrainingState, newest_checkpoint, open_checkpoint, save_training
from teratron.checkpoint import copies as module
from teratron.checkpoint.copies import Copies
from teratron.config import CheckpointConfig, UserError


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, and a store that only fsspec knows."""
    if request.param == "folder":
        return str(tmp_path / "copies")
    pytest.importorskip("fsspec")
    return f"memory://{uuid.uuid4()}"


def saved(run: Path, step: int) -> Checkpoint:
    pieces = whole_pieces({"weight/a": torch.full((50,), float(step))})
    extra = run / "tokenizer"
    extra.mkdir(parents=True, exist_ok=True)
    (extra / "chars.json").write_text("abc")
    return open_checkpoint(save_training(run, tiny("text.txt", checkpoint__keep=0), pieces, TrainingState(step), [extra]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def newest(run: Path, copies: Copies) -> Checkpoint | None:
    return newest_checkpoint(run, lambda text: None, others=copies.candidates())


def test_a_copy_comes_back_byte_for_byte_in_place_of_a_lost_or_damaged_one(place: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copies = Copies(CheckpointConfig(copy_to=place), run)
    checkpoint = saved(run, 3)
    before = contents(checkpoint.folder)
    copies.copy(checkpoint)
    path = checkpoint.folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # damaged, then gone
        found = newest(run, copies)
        assert found is not None
        assert found.folder == checkpoint.folder
        assert contents(checkpoint.folder) == before
        checkpoint.folder.rename(tmp_path / f"gone{uuid.uuid4()}")


def test_the_runs_own_good_one_is_not_fetched(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    copies = Copies(CheckpointConfig(copy_to=place), run)
    copies.copy(saved(run, 3))
    monkeypatch.setattr(Copies, "_fetch", lambda *_: pytest.fail("fetched"))
    assert newest(run, copies).step == 3  # type: ignore[union-attr]


def test_the_same_are_kept_there_as_on_disk(place: str, tmp_path: Path) -> None:
    copies = Copies(CheckpointConfig(copy_to=place, keep=2, keep_every=4), tmp_path / "run")
    for step in range(1, 8):
        copies.copy(saved(tmp_path / "run", step))
    assert copies.steps() == [7, 6, 4]
    copies.copy(saved(tmp_path / "run", 6))  # once more, as after a step back
    assert copies.steps() == [7, 6, 4]


def test_runs_do_not_see_each_other(place: str, tmp_path: Path) -> None:
    one, other = (Copies(CheckpointConfig(copy_to=place), tmp_path / name) for name in ("one", "other"))
    one.copy(saved(tmp_path / "one", 3))
    assert (len(one.candidates()), len(other.candidates())) == (1, 0)


def test_a_copy_cut_short_is_passed_over(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file: without its marker it is no checkpoint."""
    run = tmp_path / "run"
    copies = Copies(CheckpointConfig(copy_to=place), run)
    copies.copy(saved(run, 1))
    original, after = Copies._copy_file, range(4)
    for count in after:
        left = iter(range(count))

        def cut(self: Copies, source: object, name: str, left: object = left) -> None:
            if next(left, None) is None:  # type: ignore[call-overload]
                raise OSError(5, "Input/output error")
            original(self, source, name)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Copies, "_copy_file", cut)
            with pytest.raises(UserError, match=r"step-00000002 cannot be copied: Input/output error"):
                copies.copy(saved(run, 2))
        for folder in (run / "checkpoints").iterdir():
            folder.rename(tmp_path / f"gone{uuid.uuid4()}")
        assert newest(run, copies).step == 1  # type: ignore[union-attr]


def test_a_store_that_garbles_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Garbling(module._LocalFiles):
        def open(self, path: str, mode: str) -> object:
            if mode == "rb":
                Path(path).write_bytes(b"else")
            return super().open(path, mode)

    monkeypatch.setattr(module, "_LocalFiles", Garbling)
    copies = Copies(CheckpointConfig(copy_to=str(tmp_path / "copies")), tmp_path / "run")
    with pytest.raises(UserError, match="reads back as something else"):
        copies.copy(saved(tmp_path / "run", 1))


def test_a_checkpoint_that_is_removed_meanwhile_is_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    copies = Copies(CheckpointConfig(copy_to=str(tmp_path / "copies")), run)
    checkpoint = saved(run, 3)
    before, original = contents(checkpoint.folder), Copies._copy_file

    def removing(self: Copies, source: object, name: str) -> None:
        module.discard(checkpoint.folder)
        original(self, source, name)  # type: ignore[arg-type]

    monkeypatch.setattr(Copies, "_copy_file", removing)
    copies.copy(checkpoint)
    assert contents(tmp_path / "copies" / "run" / "step-00000003") == before


def test_a_place_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint\.copy_to = .*file: cannot be used: (Not a directory|File exists)"):
        Copies(CheckpointConfig(copy_to=str(tmp_path / "file")), tmp_path / "run")
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"checkpoint\.copy_to = nosuch://x: cannot be used: .*nosuch"):
        Copies(CheckpointConfig(copy_to="nosuch://x"), tmp_path / "run")


def test_a_forged_copy_writes_nowhere_else(tmp_path: Path) -> None:
    """Its manifest is not believed about where its files go."""
    run = tmp_path / "run"
    copies = Copies(CheckpointConfig(copy_to=str(tmp_path / "copies")), run)
    checkpoint = saved(run, 3)
    copies.copy(checkpoint)
    module.discard(checkpoint.folder)
    forged = tmp_path / "copies" / "run" / "step-00000003"
    import hashlib

    text = (forged / "manifest.json").read_text().replace("tokenizer/chars.json", "../../escaped.json").encode()
    (forged / "manifest.json").write_bytes(text)
    (forged / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())
    with pytest.raises(UserError, match="no good checkpoint is left"):
        newest(run, copies)
    assert "escaped.json" not in os.listdir(run)
