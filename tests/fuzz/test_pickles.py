"""Nothing is ever unpickled: no reader can, and a pickle that stands where tensors should is refused without being run."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny import tiny

import teratron
from teratron.checkpoint import TrainingState, open_checkpoint, open_weights, save_training
from teratron.config import UserError
from teratron.parallel.boxes import Box, Piece

SOURCES = sorted(Path(teratron.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"load", "hub", "load_state_dict_from_url"}
"""Of torch; `torch.load` unpickles."""


def unpicklers(source: str) -> list[str]:
    """What in a module could unpickle: imports, `torch.load`, and numpy's `allow_pickle`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                found.append(module)
            case ast.ImportFrom(module="torch", names=names):
                found += [f"torch.{name.name}" for name in names if name.name in CALLS]
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in CALLS:
                found.append(f"torch.{name}")
            case ast.keyword(arg="allow_pickle"):
                found.append("allow_pickle")
    return found


def test_no_module_can_unpickle() -> None:
    assert {path.name: found for path in SOURCES if (found := unpicklers(path.read_text("utf-8")))} == {}
    assert len(SOURCES) > 50


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load", "f(x, allow_pickle=True)"],
)
def test_what_unpickles_is_seen(source: str) -> None:
    assert unpicklers(source) != []


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def pickled(file: Path, how: str, target: Path) -> None:
    if how == "pickle":
        target.write_bytes(pickle.dumps(Trap(file)))
    else:
        torch.save({"weight/a": Trap(file)}, target)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    pieces = [Piece("weight/a", (2,), (Box((0,), (2,)),), torch.ones(2))]
    return save_training(tmp_path, tiny("text"), pieces, TrainingState(3))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_in_place_of_tensors_is_refused_and_not_run(tmp_path: Path, checkpoint: Path, how: str) -> None:
    """Also when the manifest's checksum has been made to match."""
    (path,) = checkpoint.glob("rank-*")
    pickled(tmp_path / "trapped", how, path)
    tree = json.loads((checkpoint / "manifest.json").read_text())
    tree["files"][path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    text = json.dumps(tree).encode()
    (checkpoint / "manifest.json").write_bytes(text)
    (checkpoint / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())
    opened = open_checkpoint(checkpoint)
    opened.verify()
    with pytest.raises(UserError, match="damaged checkpoint"):
        opened.load()
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE"])
def test_a_pickle_in_place_of_the_manifest_is_refused_and_not_run(tmp_path: Path, checkpoint: Path, name: str, how: str) -> None:
    pickled(tmp_path / "trapped", how, checkpoint / name)
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(checkpoint)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_in_place_of_weights_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    pickled(tmp_path / "trapped", how, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_weights(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError):
        open_weights(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_the_trap_is_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "trapped")))
    assert (tmp_path / "trapped").exists()
