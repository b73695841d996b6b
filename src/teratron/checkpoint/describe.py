"""A checkpoint in words: where it stands, what made it, and a table of what it holds, in plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from teratron.checkpoint.manifest import StoredTensor
from teratron.checkpoint.reader import Checkpoint
from teratron.checkpoint.training import saved_state
from teratron.config import Config, UserError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A layer's number in a name."""


def describe_checkpoint(checkpoint: Checkpoint, every_tensor: bool = False) -> Iterator[str]:
    """Lines that tell what a checkpoint holds, from its manifest alone; equal layers share a line unless every tensor is asked for."""
    yield str(checkpoint.folder)
    for key, value in _facts(checkpoint):
        yield f"  {key:<11} {value}"
    yield ""
    tensors = sorted(checkpoint.tensors.values(), key=_reading_order)
    yield from _table(_every(tensors) if every_tensor else _grouped(tensors))


def _facts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What is said above the table, as (name, text)."""
    config, tensors = checkpoint.config(), checkpoint.tensors.values()
    yield "step", f"{checkpoint.step:,} of {config.train.steps:,}"
    try:
        state = saved_state(checkpoint)
        yield "trained on", f"{state.tokens:,} tokens, for {state.seconds:,.0f} s"
    except UserError:
        yield "trained on", "unknown: it holds no state of a training run"
    yield "written", _written(checkpoint.manifest)
    yield "model", _model(config)
    optim, train = config.optim, config.train
    batch = f"global batch {config.largest_batch:,}"
    yield "training", f"{train.precision}, {optim.name}, learning rate {optim.lr:g}, {batch}, seed {train.seed}"
    yield "parameters", f"{sum(tensor.count for tensor in tensors if _kind(tensor) == 'weight'):,}"
    for kind in sorted(set(map(_kind, tensors)), key=_kind_order):
        own = [tensor for tensor in tensors if _kind(tensor) == kind]
        dtypes = " and ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in own))
        yield kind, f"{size_text(sum(tensor.count * tensor.dtype.itemsize for tensor in own))} in {dtypes}"
    pieces = [piece for tensor in tensors for piece in tensor.pieces]
    files, held = checkpoint.manifest["files"], {piece.file for piece in pieces}
    total = size_text(sum(entry["bytes"] for entry in files.values()))
    yield "files", f"{len(files):,} ({total}), {len(held):,} of tensors: {len(tensors):,} tensors in {len(pieces):,} pieces"


def _written(manifest: dict[str, Any]) -> str:
    when = f"{datetime.fromtimestamp(manifest['time'], UTC):%Y-%m-%d %H:%M} UTC" if "time" in manifest else "at an unknown time"
    layout = ", ".join(f"{key} {value}" for key, value in manifest.get("layout", {}).items())
    return f"{when}; layout: {layout}" if layout else when


def _model(config: Config) -> str:
    model, context = config.model, f"context {config.model.positions:,}, vocabulary {config.model.vocab_size:,}"
    shared = f" ({model.key_value_heads} key/value)" if model.key_value_heads != model.heads else ""
    return f"{model.family}, {model.layers} layers x {model.hidden:,}, {model.heads} heads{shared}, {context}"


def size_text(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,} bytes"


def _kind(tensor: StoredTensor) -> str:
    return tensor.name.partition("/")[0]


def _part(tensor: StoredTensor) -> str:
    return tensor.name.partition("/")[2]


def _reading_order(tensor: StoredTensor) -> tuple[Any, ...]:
    """As data flow: the embedding first, the head last; layers by number; the weight before what is kept beside it."""
    part = _part(tensor)
    place = {"embedding": 0, "head": 2}.get(part.partition(".")[0], 1)
    words = [(int(word), "") if word.isdecimal() else (0, word) for word in re.split(r"(\d+)", part)]
    return place, words, *_kind_order(_kind(tensor))


def _kind_order(kind: str) -> tuple[bool, str]:
    return kind != "weight", kind


@dataclass
class _Row:
    """Tensors that are told in one line."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kinds: tuple[str, ...]
    numbers: list[int] = field(default_factory=list)
    pieces: set[int] = field(default_factory=set)

    def cells(self) -> tuple[str, ...]:
        name = self.name.replace("{}", _runs(self.numbers))
        low, high = min(self.pieces, default=0), max(self.pieces, default=0)
        shape = " x ".join(map(str, self.shape)) or "scalar"
        return name, shape, self.dtype, str(low) if low == high else f"{low} to {high}", " ".join(self.kinds)


def _every(tensors: Sequence[StoredTensor]) -> list[_Row]:
    return [
        _Row(tensor.name, tensor.shape, str(tensor.dtype).removeprefix("torch."), (), pieces={len(tensor.pieces)}) for tensor in tensors
    ]


def _grouped(tensors: Sequence[StoredTensor]) -> list[_Row]:
    """One row for the parts that differ in their layer's number only, and for all that is kept of a part."""
    parts: dict[tuple[Any, ...], list[StoredTensor]] = {}
    for tensor in tensors:
        parts.setdefault((_part(tensor), tensor.shape, tensor.dtype), []).append(tensor)
    rows: dict[tuple[Any, ...], _Row] = {}
    for (part, shape, dtype), kept in parts.items():
        name, kinds = _NUMBER.sub("{}", part, count=1), tuple(map(_kind, kept))
        row = rows.setdefault((name, shape, dtype, kinds), _Row(name, shape, str(dtype).removeprefix("torch."), kinds))
        row.numbers += map(int, _NUMBER.findall(part)[:1])
        row.pieces |= {len(tensor.pieces) for tensor in kept}
    return list(rows.values())


def _runs(numbers: Sequence[int]) -> str:
    """Layer numbers in short: {0..95}, {0,2,4..7}, or the only one."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{low}..{high}" if high > low else str(low) for low, high in runs) + "}"


def _table(rows: Sequence[_Row]) -> Iterator[str]:
    """Rows under headings; what is kept of each part is told once where it is the same for all."""
    heads = ("part", "shape", "dtype", "pieces", "kept")
    same = len({row.kinds for row in rows}) <= 1
    lines = [(heads[:4] if same else heads), *((row.cells()[:4] if same else row.cells()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
