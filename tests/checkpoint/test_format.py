"""Checkpoints on disk: readable by safetensors, described in full, crash-proof at every line of the writer, never trusted blindly."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from held import whole_pieces
from safetensors.torch import load_file
from torch import Tensor

from teratron.checkpoint import agree, manifest, newest_checkpoint, open_checkpoint, stream
from teratron.checkpoint import format as writer
from teratron.checkpoint.format import write_checkpoint
from teratron.config import UserError

TENSORS = [
    ("weight/a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
    ("weight/b", torch.tensor([1.5, -2.0], dtype=torch.bfloat16)),
    ("moment1/a", torch.full((2, 3), 1 / 3, dtype=torch.float64)),
]


def write(run: Path, step: int = 1, scale: float = 1.0, extra: tuple[Path, ...] = ()) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    pieces = whole_pieces({name: tensor * scale for name, tensor in TENSORS})
    write_checkpoint(folder, pieces, {"step": step, "state": {}, "config": {}}, extra)
    return folder


def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    (folder / "deep").mkdir(parents=True)
    (folder / "chars.json").write_text("abc")
    (folder / "deep" / "more.json").write_text("def")
    return folder


def damage(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it a marker that matches, as a forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    sign(folder, json.dumps(manifest).encode())


def sign(folder: Path, text: bytes) -> None:
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())


def test_safetensors_itself_reads_it(tmp_path: Path) -> None:
    found = load_file(write(tmp_path) / "rank-00000.safetensors")
    assert found.keys() == dict(TENSORS).keys()
    for name, tensor in TENSORS:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_manifest_describes_every_tensor_and_file(tmp_path: Path) -> None:
    folder = write(tmp_path, extra=(tokenizer(tmp_path),))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, tensor in TENSORS:
        entry = manifest["tensors"][name]
        assert (entry["dtype"], entry["shape"]) == (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        (piece,) = entry["pieces"]
        assert piece["boxes"] == [{"offset": [0] * tensor.dim(), "size": list(tensor.shape)}]
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json", "COMPLETE"}
    assert manifest["files"].keys() == on_disk == {"rank-00000.safetensors", "tokenizer/chars.json", "tokenizer/deep/more.json"}
    for name, recorded in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert recorded == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_views_and_big_tensors_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_BLOCK", 64)
    whole = torch.randn(40, 7)
    pieces = whole_pieces({"weight/rows": whole[3:30], "weight/columns": whole[:, 2:4]})
    write_checkpoint(tmp_path / "c", pieces, {"step": 1, "config": {}})
    found = open_checkpoint(tmp_path / "c").load("weight/")
    assert torch.equal(found["rows"], whole[3:30])
    assert torch.equal(found["columns"], whole[:, 2:4])


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut would show a missing flush; hundreds of them cost seconds."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_line_leaves_a_good_checkpoint(tmp_path: Path, every: int) -> None:
    """The process dies before the k-th line that the writer executes, for every k: the former or the new one is found, whole."""
    extra = (tokenizer(tmp_path),)
    for crashed in itertools.count(0, every):
        run = tmp_path / f"run{crashed}"
        write(run, step=1, extra=extra)
        finished = dies_at_line(crashed, lambda run=run: write(run, step=2, scale=2.0, extra=extra))
        found = newest_checkpoint(run, lambda text: pytest.fail(f"looked whole and was not: {text}"))
        assert found is not None
        assert_values(found.load("weight/"), scale=float(found.step))
        write(run, step=2, scale=2.0, extra=extra)  # the next process saves again
        assert sorted(os.listdir(run / "checkpoints")) == ["step-00000001", "step-00000002"]
        if finished:
            break
        shutil.rmtree(run)
    assert found.step == 2
    assert crashed > 100, "the writer has more lines than this"


@pytest.mark.usefixtures("no_fsync")
def test_a_damaged_checkpoint_is_replaced_crash_or_not(tmp_path: Path) -> None:
    for line in range(0, 200, 7):
        run = tmp_path / f"run{line}"
        write(run, step=1)
        (write(run, step=2) / "COMPLETE").unlink()
        if dies_at_line(line, lambda run=run: write(run, step=2, scale=2.0)):
            break
        found = newest_checkpoint(run, lambda text: None)
        assert found is not None
        assert_values(found.load("weight/"), scale=float(found.step))
    assert open_checkpoint(write(run, step=2, scale=2.0)).step == 2


class Crash(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def dies_at_line(number: int, action: Callable[[], object]) -> bool:
    """Run until the writer's modules are about to execute their number-th line; True when the action ended before that."""
    left = number
    files = {module.__file__ for module in (writer, stream, manifest, agree)}

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            if left == 0:
                raise Crash
            left -= 1
        return on_line

    former = sys.gettrace()
    sys.settrace(lambda frame, event, argument: on_line if frame.f_code.co_filename in files else None)
    try:
        action()
    except Crash:
        return False
    finally:
        sys.settrace(former)
    return True


def assert_values(weights: dict[str, Tensor], scale: float) -> None:
    for name, tensor in TENSORS[:2]:
        assert torch.equal(weights[name.partition("/")[2]], tensor * scale)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    write(tmp_path, step=1)

    def refuse(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match="earlier checkpoints are intact") as error:
            write(tmp_path, step=2)
    assert ("disk" in str(error.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1  # type: ignore[union-attr]


def test_a_real_refusal_of_the_kernel(tmp_path: Path) -> None:
    """A limit on file sizes fails in the middle of a tensor, as a full disk does."""
    write(tmp_path, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="larger than a file may be here"):
            write_checkpoint(tmp_path / "checkpoints" / "step-00000002", whole_pieces({"weight/a": torch.zeros(10_000)}), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, step=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    monkeypatch.setattr(writer, "_write_safetensors", lambda *a: pytest.fail("began to write"))
    with pytest.raises(UserError, match="disk full: a checkpoint needs 1 MiB, 0 MiB are free"):
        write(tmp_path, step=2)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", "COMPLETE", "tokenizer/chars.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
def test_any_harm_to_any_file_is_seen_and_the_one_before_is_used(tmp_path: Path, name: str, harm: str) -> None:
    extra = (tokenizer(tmp_path),)
    write(tmp_path, step=1, extra=extra)
    path = write(tmp_path, step=2, scale=2.0, extra=extra) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if harm != "remove":
        path.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-1]), "empty": b""}[harm])
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert name in warnings[0] or name == "COMPLETE"


def test_every_byte_of_the_tensors_is_guarded(tmp_path: Path) -> None:
    path = write(tmp_path) / "rank-00000.safetensors"
    data = path.read_bytes()
    for place in range(0, len(data), 13):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
        with pytest.raises(UserError, match="checksum differs"):
            open_checkpoint(path.parent).verify()


def test_all_damaged_is_an_error_that_counts_them(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step=step) / "COMPLETE").unlink()
    warnings: list[str] = []
    with pytest.raises(UserError, match=r"no good checkpoint is left \(2 damaged\)"):
        newest_checkpoint(tmp_path, warnings.append)
    assert len(warnings) == 2


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, pytest.fail) is None


def test_newest_is_by_number_not_by_spelling(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step=step)
    (tmp_path / "checkpoints" / "step-200000000.old").mkdir()
    assert newest_checkpoint(tmp_path, pytest.fail).step == 100_000_000  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"7", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": "other", "version": 1}']
)
def test_a_forged_manifest_is_no_traceback(tmp_path: Path, text: bytes) -> None:
    folder = write(tmp_path)
    sign(folder, text)
    with pytest.raises(UserError, match="step-00000001"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", ""])
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path)
    (tmp_path / "checkpoints" / "outside").write_bytes(b"secret")
    damage(folder, lambda manifest: manifest["files"].update({name: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}))
    with pytest.raises(UserError, match="outside the checkpoint"):
        open_checkpoint(folder)


def remove(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return change


def replace(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


BOXES = ("tensors", "weight/a", "pieces", 0, "boxes")
"""Of a tensor of shape [2, 3]."""


def box(offset: Any, size: Any) -> dict[str, Any]:
    return {"offset": offset, "size": size}


def second_piece_of_the_same_place(manifest: Any) -> None:
    pieces = manifest["tensors"]["weight/a"]["pieces"]
    pieces[:] = [{**pieces[0], "boxes": [box([row, 0], [1, 3])]} for row in (0, 1)]


def huge(manifest: Any) -> None:
    manifest["tensors"]["weight/a"] |= {"shape": [2**40, 2**40]}
    manifest["tensors"]["weight/a"]["pieces"][0]["boxes"] = [box([0, 0], [2**40, 2**40])]


FORGERIES = {
    "no step": remove("step"),
    "step of text": replace("1", "step"),
    "step of truth": replace(True, "step"),
    "no files": remove("files"),
    "files a list": replace([], "files"),
    "no tensors": remove("tensors"),
    "tensor without pieces": remove("tensors", "weight/a", "pieces"),
    "tensor of no pieces": replace([], "tensors", "weight/a", "pieces"),
    "size of text": replace("6", "files", "rank-00000.safetensors", "bytes"),
    "a piece in an unknown file": replace("../x", "tensors", "weight/a", "pieces", 0, "file"),
    "a piece of no boxes": replace([], *BOXES),
    "a cut piece": replace([box([1, 0], [1, 3])], *BOXES),
    "too many": replace([box([0, 0], [2, 3]), box([0, 0], [1, 3])], *BOXES),
    "overlapping": replace([box([0, 0], [1, 3]), box([0, 0], [1, 3])], *BOXES),
    "overlapping askew": replace([box([0, 0], [2, 2]), box([0, 1], [1, 2])], *BOXES),
    "out of range": replace([box([1, 0], [2, 3])], *BOXES),
    "negative": replace([box([-1, 0], [2, 3])], *BOXES),
    "negative size": replace([box([0, 0], [-2, -3])], *BOXES),
    "an offset of truth": replace([box([False, 0], [2, 3])], *BOXES),
    "a fraction": replace([box([0, 0], [2.0, 3])], *BOXES),
    "a number for a list": replace([box(0, 6)], *BOXES),
    "of two dimensions and one": replace([box([0], [6])], *BOXES),
    "two pieces in one place": second_piece_of_the_same_place,
    "huge": huge,
    "negative shape of nothing": lambda manifest: manifest["tensors"]["weight/a"].update(shape=[-2, 0], pieces=[]),
    "shape of text": replace("2 x 3", "tensors", "weight/a", "shape"),
    "numbers of no type": replace("float31", "tensors", "weight/a", "dtype"),
    "numbers of a list": replace(["float32"], "tensors", "weight/a", "dtype"),
    "version": replace(2, "version"),
    "config a list": replace([], "config"),
    "layout of text": replace("tensor 2", "layout"),
    "time of text": replace("noon", "time"),
    "time beyond time": replace(1e300, "time"),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    folder = write(tmp_path)
    damage(folder, change)
    with pytest.raises(UserError, match="step-00000001"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace([3, 2], "tensors", "moment1/a", "shape"), "does not fit"),
        (replace("float16", "tensors", "moment1/a", "dtype"), "the manifest says"),
        (replace("weight/x", "tensors", "moment1/a", "pieces", 0, "key"), "weight/x"),
    ],
)
def test_tensors_that_are_not_as_described_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str) -> None:
    folder = write(tmp_path)
    damage(folder, change)
    with pytest.raises(UserError, match=reason):
        open_checkpoint(folder).load("moment1/")
