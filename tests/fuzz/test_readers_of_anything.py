"""Files from anywhere: whatever stands in them, a reader takes it or raises `UserError`; it neither crashes nor hangs nor fills memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from mutations import BYTES, TREES, as_json, edit_bytes, edit_tree, hunt
from tiny import tiny

from teratron.checkpoint import TrainingState, open_checkpoint, open_weights, save_training, saved_state, write_weights
from teratron.checkpoint.describe import describe_checkpoint
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.config import Config
from teratron.data.bpe import train_bpe
from teratron.data.indexed import IndexedDataset, IndexedWriter
from teratron.data.tokenizer import load_tokenizer
from teratron.models import build_model, parts_of
from teratron.parallel.boxes import Box, Piece
from teratron.train.history import read_history

FEW, MANY = 200, 3000
"""Inputs for each kind of file, and of the slow tests."""
Fuzz = tuple[st.SearchStrategy[Any], Callable[[Any], object]]
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


def index(folder: Path) -> Fuzz:
    """Megatron's .idx."""
    with IndexedWriter(folder / "text", np.uint16) as writer:
        for length in (3, 1, 8):
            writer.add_document(np.arange(length, dtype=np.uint16))
    valid = (folder / "text.idx").read_bytes()

    def read(edits: Any) -> None:
        (folder / "text.idx").write_bytes(edit_bytes(valid, edits))
        dataset = IndexedDataset(folder / "text")
        assert sum(len(dataset.sequence(i)) for i in range(len(dataset.lengths))) == dataset.total_tokens <= 12 * 2
        dataset.max_token()
        dataset.identity()

    return BYTES, read


def checkpoint(folder: Path) -> Path:
    """A checkpoint of two tensors, one of them in two pieces."""
    values = torch.arange(12, dtype=torch.float32)
    boxes = [(Box((0, 0), (1, 3)), Box((1, 0), (1, 2))), (Box((1, 2), (1, 1)), Box((2, 0), (2, 3)))]
    pieces = [Piece("weight/a", (4, 3), box, values[:5] if not i else values[5:]) for i, box in enumerate(boxes)]
    pieces.append(Piece("weight/b", (2,), (Box((0,), (2,)),), torch.ones(2, dtype=torch.bfloat16)))
    return save_training(folder, tiny("text"), pieces, TrainingState(3, 96, 1.5, (6,), losses=(2.5, 2.25)), layout={"ranks": 1}, data={})


def use(folder: Path, verify: bool = True) -> None:
    """All that is done with a checkpoint."""
    opened = open_checkpoint(folder)
    if verify:
        opened.verify()
    opened.load()
    saved_state(opened)
    opened.config()
    assert "\n".join(describe_checkpoint(opened, every_tensor=True))


def sign(folder: Path, text: bytes) -> None:
    """Put a manifest there with a marker that matches, as a forger would."""
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())


def manifest(folder: Path) -> Fuzz:
    """manifest.json as a tree."""
    place = checkpoint(folder)
    valid = json.loads((place / "manifest.json").read_text())

    def read(edits: Any) -> None:
        sign(place, as_json(edit_tree(valid, edits)))
        use(place, verify=False)

    return TREES, read


def manifest_bytes(folder: Path) -> Fuzz:
    """manifest.json as bytes."""
    place = checkpoint(folder)
    valid = (place / "manifest.json").read_bytes()

    def read(edits: Any) -> None:
        sign(place, edit_bytes(valid, edits))
        use(place)

    return BYTES, read


def tensors(folder: Path) -> Fuzz:
    """A rank's safetensors file, under a manifest with its checksum: the numbers may be any, the header not."""
    place = checkpoint(folder)
    (path,) = place.glob("rank-*")
    valid, tree = path.read_bytes(), json.loads((place / "manifest.json").read_text())

    def read(edits: Any) -> None:
        content = edit_bytes(valid, edits)
        path.write_bytes(content)
        tree["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        sign(place, as_json(tree))
        use(place)

    return BYTES, read


def weights(folder: Path) -> Fuzz:
    """The file of `teratron convert`."""
    file = folder / "weights.safetensors"
    config = Config().override({"model.layers": 1, "model.hidden": 4, "model.heads": 1, "model.seq_length": 4, "model.vocab_size": 5})
    parts = parts_of(build_model(config.model))
    entries = [Entry(part.name, torch.float32, part.shape, partial(torch.ones, part.shape)) for part in parts]
    write_weights(Weights(config.model, entries, None, "a model"), file)
    valid = file.read_bytes()

    def read(edits: Any) -> None:
        file.write_bytes(edit_bytes(valid, edits))
        for entry in open_weights(file).parts:
            entry.values()

    return BYTES, read


def config(folder: Path) -> Fuzz:
    """A config's TOML."""
    file, valid = folder / "config.toml", tiny("text").to_toml().encode()

    def read(edits: Any) -> None:
        file.write_bytes(edit_bytes(valid, edits))
        assert Config.load(file).to_toml()

    return BYTES, read


def tokenizer(name: str, content: Callable[[], bytes], trees: bool = False, beside: dict[str, str] | None = None) -> Callable[[Path], Fuzz]:
    """A tokenizer's file, as bytes or as a tree, with others beside it."""

    def make(folder: Path) -> Fuzz:
        file, valid = folder / name, content()
        for other, text in (beside or {}).items():
            (folder / other).write_text(text)

        def read(edits: Any) -> None:
            file.write_bytes(as_json(edit_tree(json.loads(valid), edits)) if trees else edit_bytes(valid, edits))
            found = load_tokenizer(folder)
            assert found.fingerprint
            found.decode(found.encode("a cat"))

        return (TREES if trees else BYTES), read

    return make


def bpe() -> bytes:
    return str(train_bpe(["the cat sat on the mat"] * 9, 270)._engine.to_str()).encode()  # type: ignore[attr-defined]


def wordpieces() -> bytes:
    return b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\ncat\n##s\nthe\n"


def metrics(folder: Path) -> Fuzz:
    """metrics.jsonl, a line of which is a tree."""
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0, "time": 5.0}]
    lines += [{"event": "step", "step": i, "loss": 2.0, "seconds": 0.1, "lr": 0.1, "time": 6.0 + i} for i in range(1, 4)]
    lines += [{"event": "ranks", "step": 3, "seconds": [1, 2], "stragglers": [{"rank": 1, "times": 2.0}]}]
    lines += [{"event": "resume", "step": 2, "time": 12}, {"event": "save", "step": 2, "seconds": 1, "stall": 0.1}]

    def read(edits: Any) -> None:
        byte_edits, tree_edits = edits
        edited = edit_tree({"lines": lines}, tree_edits)
        (folder / "metrics.jsonl").write_bytes(edit_bytes(b"\n".join(map(as_json, _values(edited))), byte_edits))
        history = read_history(folder / "metrics.jsonl")
        assert history.goodput is not None
        history.median("loss")
        history.total("save", "stall")
        history.of_kind("save")

    return st.tuples(st.one_of(st.just([]), BYTES), TREES), read


def _values(tree: Any) -> list[Any]:
    """The lines that a tree has been edited into."""
    found = tree.get("lines") if isinstance(tree, dict) else tree
    return found if isinstance(found, list) else [found]


READERS: dict[str, Callable[[Path], Fuzz]] = {
    "index": index,
    "manifest": manifest,
    "manifest bytes": manifest_bytes,
    "tensors": tensors,
    "weights": weights,
    "config": config,
    "tokenizer.json": tokenizer("tokenizer.json", bpe),
    "tokenizer.json tree": tokenizer("tokenizer.json", bpe, trees=True),
    "chars.json": tokenizer("chars.json", lambda: b'{"type": "chars", "characters": " acht"}', trees=True),
    "vocab.txt": tokenizer("vocab.txt", wordpieces),
    "vocab.json": tokenizer("vocab.json", lambda: b'{"a": 0, "c": 1, "t": 2, "at": 3, "cat": 4}', True, {"merges.txt": "#\na t\nc at\n"}),
    "merges.txt": tokenizer("merges.txt", lambda: b"#\na t\nc at\n", False, {"vocab.json": '{"a": 0, "c": 1, "t": 2, "at": 3, "cat": 4}'}),
    "tokenizer_config.json": tokenizer(
        "tokenizer_config.json", lambda: b'{"eos_token": {"content": "[SEP]"}, "x": [1]}', beside={"vocab.txt": wordpieces().decode()}
    ),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", READERS)
def test_a_reader_takes_it_or_refuses_it(tmp_path: Path, kind: str, count: int) -> None:
    hunt(*READERS[kind](tmp_path), count)


@pytest.mark.parametrize("count", COUNTS)
def test_metrics_are_read_whatever_stands_there(tmp_path: Path, count: int) -> None:
    hunt(*metrics(tmp_path), count, least=0)
