"""Examples of a task: named arrays of unequal length in one safetensors file, taken as batches in an order that is keyed by the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from teratron.config import UserError
from teratron.data.order import permute

Example = Mapping[str, np.ndarray]
"""1-D arrays by the names that they have in a batch: `tokens`, `targets`, `weights`, `segments` ...; those of a stream, such as
`encoder_tokens`, are of one length."""
STREAMS = ("encoder_", "")
ROUND = 8
"""Batches are as long as their longest example, rounded up to a multiple of this."""
_LENGTHS = "lengths"


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples, which must all have the same fields; the file appears when it is complete."""
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial")
    save_file(packed(examples), partial)
    partial.replace(path)


def packed(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Every field of all examples one behind the other, and the lengths of each stream."""
    fields = {name: [np.asarray(example[name]) for example in examples] for name in examples[0]}
    kinds = {name: np.float32 if values[0].dtype.kind == "f" else np.int32 for name, values in fields.items()}
    arrays: dict[str, np.ndarray] = {name: np.concatenate(values).astype(kinds[name]) for name, values in fields.items()}
    for stream in STREAMS:
        if f"{stream}tokens" in fields:
            arrays[f"{stream}{_LENGTHS}"] = np.array([len(values) for values in fields[f"{stream}tokens"]], np.int64)
    return arrays


def side_by_side(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """The fields of one example whose segments 0, 1, ... are those of several: they do not see each other, and positions begin anew."""
    fields = {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
    sizes = [len(example["tokens"]) for example in examples]
    positions = np.concatenate([np.arange(size) for size in sizes])
    return fields | {"positions": positions, "segments": np.repeat(np.arange(len(sizes)), sizes)}


def longest(examples: Iterable[Example]) -> int:
    """Tokens of the longest one, of its longest stream."""
    return max(len(values) for example in examples for values in example.values())


class Examples:
    """The examples of a file: endless and shuffled in each epoch, or once in their order. A `Samples` that gives batches, not rows."""

    def __init__(self, arrays: Mapping[str, np.ndarray], seq_length: int, seed: int | None = None, name: str = "") -> None:
        """arrays: as `packed` makes them. seed: of the order; None = each example once, as they stand. Raises `UserError` for one that is
        too long."""
        self._fields = dict(arrays)
        self.seq_length, self._seed = seq_length, seed
        self._lengths = {s: self._fields.pop(f"{s}{_LENGTHS}") for s in STREAMS if f"{s}{_LENGTHS}" in self._fields}
        self._starts = {stream: np.cumsum(lengths) - lengths for stream, lengths in self._lengths.items()}
        self.size = len(self._lengths[""])
        """How many there are."""
        self.count: int | None = self.size if seed is None else None
        longest = max(int(lengths.max()) for lengths in self._lengths.values())
        if longest > seq_length:
            raise UserError(f"{name}: holds an example of {longest} tokens, model.seq_length is {seq_length}: raise it to {longest}")

    @classmethod
    def load(cls, path: Path, seq_length: int, seed: int | None = None) -> Examples:
        """Those of a file; raises `UserError` for a file of anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls(load_file(path), seq_length, seed, str(path))
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: no readable file of examples ({error}): make it again with `teratron finetune`") from None

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Examples at hand, each once."""
        return cls(packed(examples), longest(examples))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, of its longest stream."""
        return np.max(list(self._lengths.values()), axis=0)

    @property
    def tokens(self) -> int:
        """Tokens of all examples, of every stream."""
        return sum(int(lengths.sum()) for lengths in self._lengths.values())

    def identity(self) -> str:
        """What they are, for comparison."""
        held = hashlib.sha256()
        for name, values in sorted((self._fields | self._lengths).items()):
            held.update(name.encode() + values.tobytes())
        return held.hexdigest()[:16]

    def rows(self, index: np.ndarray) -> np.ndarray:
        raise TypeError("examples are taken, not read as rows")

    def numbers(self, index: np.ndarray) -> np.ndarray:
        """Which examples the samples `index` are: in each epoch every one once, in an order of its own."""
        if self._seed is None:
            return index
        epochs, places = np.divmod(index, self.size)
        return permute(places, self.size, self._seed, epochs)

    def take(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of the samples `index` [B]: every field [B, S], `positions` where the examples have none, `sample` [B].

        At padding `segments` is -1, all else 0; examples without segments have `real` where there is padding, False there.
        """
        numbers = self.numbers(np.asarray(index))
        batch: dict[str, torch.Tensor] = {"sample": torch.from_numpy(np.array(index, np.int64))}
        for stream, lengths in self._lengths.items():
            batch |= self._stream(stream, lengths[numbers], self._starts[stream][numbers])
        return batch

    def _stream(self, stream: str, lengths: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
        longest = min(-(-int(lengths.max()) // ROUND) * ROUND, self.seq_length)
        place = np.arange(longest)
        real = place < lengths[:, None]
        where = np.where(real, starts[:, None] + place, 0)
        found: dict[str, np.ndarray] = {}
        for name, values in self._fields.items():
            if name.startswith("encoder_") == bool(stream):
                found[name] = np.where(real, values[where], -1 if name.endswith("segments") else 0)
        found.setdefault(f"{stream}positions", np.broadcast_to(place, real.shape))
        if f"{stream}segments" not in found and not real.all():
            found[f"{stream}real"] = real
        return {name: torch.from_numpy(np.ascontiguousarray(_wide(values))) for name, values in found.items()}


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64) if values.dtype.kind == "i" else values
