"""Files of torch.save are read as torch reads them, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import random
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teratron.checkpoint.megatron.pickles import Record, read_pickle
from teratron.checkpoint.megatron.torch_files import Stored, load_torch
from teratron.config import UserError


class Kind(enum.Enum):
    DECODER = 1


class Called:
    """An object that is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_data_are_read_as_torch_reads_them(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(5, 6)
    tensors = {
        "whole": base,
        "view": base[1:4, ::2],
        "turned": base.t(),
        "half": base.bfloat16(),
        "number": torch.tensor(3),
        "none": base[:0],
    }
    content = {
        "model": OrderedDict(tensors, parameter=torch.nn.Parameter(base)),
        "args": argparse.Namespace(kind=Kind.DECODER, dtype=torch.float32, path=Path("/a/b"), layers=2, big=2**70, text="ä"),
        "rng_state": [{"np": np.random.get_state(), "random": random.getstate(), "torch": torch.get_rng_state()}],
        "set": {1, 2}, "bytes": b"\x00\xff", "size": base.shape, "rate": 1e-3, "flags": (True, None),
    }  # fmt: skip
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    found = load_torch(tmp_path / "file.pt")
    for name, tensor in content["model"].items():
        stored = found["model"][name]
        assert isinstance(stored, Stored)
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(stored.values(), tensor)
    args = found["args"].attributes
    assert (args["layers"], args["big"], args["text"], args["path"]) == (2, 2**70, "ä", "/a/b")
    if isinstance(args["kind"], Record):
        assert args["kind"].arguments == (1,)
    else:  # Python 3.11.0 to 3.11.3 pickle a member by its name
        assert args["kind"].name.endswith("Kind.DECODER")
    for name in ("set", "bytes", "rate", "flags"):
        assert found[name] == content[name]
    assert found["size"] == tuple(base.shape)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_is_read(protocol: int) -> None:
    shared = [1, 2]
    content = {"a": [shared, shared, {"b": (1, 2, 3, 4)}], "c": -1.5, "d": ["x" * 300, 2**40, -7, True], "e": frozenset({1})}
    assert read_pickle(io.BytesIO(pickle.dumps(content, protocol)), "a pickle") == content


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "system"),
        (eval, ("open('{}', 'w')",), "eval"),
        (Path.touch, (Path("{}"),), "touch"),
        (subprocess.Popen, ("touch {}",), "Popen"),
        (torch.load, ("{}",), "load"),
        (print, ("x",), "print"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_calls_are_refused_and_never_run(tmp_path: Path, function: Any, arguments: tuple[Any, ...], named: str, zipped: bool) -> None:
    trap = tmp_path / "trapped"
    filled = [type(a)(str(a).format(trap)) for a in arguments]
    torch.save({"model": {}, "args": Called(function, *filled)}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=named):
        load_torch(tmp_path / "file.pt")
    assert not trap.exists()


def test_the_result_of_a_call_cannot_be_called() -> None:
    """`getattr` of an enum gives a name; that of anything else would give a method."""
    for owner in (argparse.Namespace(), "text"):
        with pytest.raises(UserError, match="not run"):
            read_pickle(io.BytesIO(pickle.dumps(Called(getattr, owner, "format"))), "a pickle")


def test_classes_are_inert() -> None:
    found = read_pickle(io.BytesIO(pickle.dumps(argparse.Namespace(inner=argparse.Namespace(x=1)))), "a pickle")
    assert (found.name, found.attributes["inner"].attributes) == ("argparse.Namespace", {"x": 1})


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused(tmp_path: Path, zipped: bool) -> None:
    """Wherever a file ends too early; and what is no file of torch.save."""
    path = tmp_path / "file.pt"
    torch.save({"w": torch.randn(64, 64)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (1, 20, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"file\.pt"):
            load_torch(path)["w"].values()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_torch(path)
    path.write_bytes(b"{}" * 100)
    with pytest.raises(UserError, match=r"not a file of torch\.save"):
        load_torch(path)


def test_a_tensor_larger_than_its_numbers_is_refused(tmp_path: Path) -> None:
    rebuilt = torch.randn(4).__reduce_ex__(2)

    def widened(storage: Any, offset: int, _: Any, *rest: Any) -> tuple[Any, ...]:
        return storage, offset, (100,), *rest

    torch.save({"w": Called(rebuilt[0], *widened(*rebuilt[1]))}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="larger than its numbers"):
        load_torch(tmp_path / "file.pt")
