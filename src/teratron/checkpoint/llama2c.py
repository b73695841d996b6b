"""Files of llama2.c, both ways: seven integers, then every weight in float32; and the tokenizer.bin that its programs read.

Only the first version is known, which llama2.c calls legacy. It turns neighbouring features of a head, ours are halves; the base of
its frequencies is 10,000, and 1e-5 is added to variances.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teratron.checkpoint.huggingface.layouts import BELOW, NEIGHBOURS, Layout
from teratron.checkpoint.probe import Compared, compare
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.config import ModelConfig, UserError
from teratron.config.meaning import meaning
from teratron.data.tok_sentencepiece import SentencePieceTokenizer
from teratron.data.tokenizer import Tokenizer, load_tokenizer
from teratron.models import build_model, parts_of

_HEADER = struct.Struct("<7i")
_LATER = 0x616B3432
"""What files of later versions begin with."""


class _Place(NamedTuple):
    """Tensors of one kind, of all layers or of none, one behind the other."""

    part: str
    layout: Layout = BELOW


_PLACES = (
    _Place("embedding.tokens.weight"),
    _Place("blocks.#.attention_norm.weight"),
    _Place("blocks.#.attention.q.weight", NEIGHBOURS),
    _Place("blocks.#.attention.k.weight", NEIGHBOURS),
    _Place("blocks.#.attention.v.weight"),
    _Place("blocks.#.attention.output.weight"),
    _Place("blocks.#.ffn_norm.weight"),
    _Place("blocks.#.ffn.gate.weight"),
    _Place("blocks.#.ffn.down.weight"),
    _Place("blocks.#.ffn.up.weight"),
    _Place("head.norm.weight"),
)


def open_llama2c(path: Path) -> Weights:
    """The weights in a file, with the SentencePiece model beside it that has as many ids. Raises `UserError` for any other file."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or int.from_bytes(header[:4], "little") == _LATER:
        raise UserError(f"{path}: expected a llama2.c file of the first version: export it with --version 0, which its run.c reads")
    config = _config(path, _HEADER.unpack(header))
    shapes, offset, parts = _shapes(config), _HEADER.size, []
    for place, name in _names(config):
        parts.append(Entry(name, torch.float32, shapes[name], partial(_read, path, offset, shapes[name], place.layout, config)))
        offset += 4 * math.prod(shapes[name])
    offset += 4 * config.seq_length * config.head_features  # cosines and sines
    if not config.tie_embeddings:
        shape = shapes["embedding.tokens.weight"]
        parts.append(Entry("head.output.weight", torch.float32, shape, partial(_read, path, offset, shape, BELOW, config)))
        offset += 4 * math.prod(shape)
    if path.stat().st_size != offset:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, its header tells of {offset:,}: no llama2.c file, or a part of one")
    return Weights(config, parts, _tokenizer(path.parent, config.vocab_size), str(path))


def _config(path: Path, header: tuple[int, ...]) -> ModelConfig:
    hidden, ffn, layers, heads, kv_heads, vocab, length = header
    try:
        return ModelConfig(
            layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, seq_length=length, vocab_size=abs(vocab),
            tie_embeddings=vocab > 0, norm="rmsnorm", norm_eps=1e-5, activation="swiglu", position="rope", bias=False,
        )  # fmt: skip
    except (UserError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a llama2.c file: its header says {list(header)} ({error})") from None


def _names(config: ModelConfig) -> Iterator[tuple[_Place, str]]:
    """Every part in the file's order, but for an output projection of its own."""
    for place in _PLACES:
        for layer in range(config.layers) if "#" in place.part else (0,):
            yield place, place.part.replace("#", str(layer))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {part.name: part.shape for part in parts_of(build_model(config, device="meta"))}


def _read(path: Path, offset: int, shape: tuple[int, ...], layout: Layout, config: ModelConfig) -> Tensor:
    values = torch.from_numpy(np.memmap(path, "<f4", "c", offset, shape))
    return layout.split([values], [torch.empty(shape, device="meta")], config)[0]


def _tokenizer(folder: Path, ids: int) -> Tokenizer | None:
    found = sorted(folder.glob("*.model"))
    tokenizer = load_tokenizer(found[0]) if len(found) == 1 else None
    return tokenizer if tokenizer is not None and tokenizer.vocab_size == ids else None


def write_llama2c(weights: Weights, output: Path, overwrite: bool = False) -> Compared:
    """Write weights as a file of llama2.c, and beside it NAME.tokenizer.bin where the tokenizer is one of SentencePiece's.

    The file appears when it has been read back and compared. Raises `UserError` for a model that is no Llama of its kind, and where it
    cannot be written.
    """
    if output.is_dir() or not output.parent.is_dir() or output.suffix != ".bin":
        raise UserError(f"{output}: expected the name of a file that ends with .bin, in a folder that exists")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists: choose another name, or add --overwrite")
    config = weights.config
    header = (
        config.hidden, config.ffn_width, config.layers, config.heads, config.key_value_heads,
        config.vocab_size if config.tie_embeddings else -config.vocab_size, config.positions,
    )  # fmt: skip
    _check(weights, _config(output, header))
    place = output.with_name(f".{output.stem}.partial.bin")
    try:
        with place.open("wb") as file:
            file.write(_HEADER.pack(*header))
            for block in _blocks(weights.cast(torch.float32)):
                file.write(block.contiguous().numpy().data)
        compared = compare(weights.cast(torch.float32), open_llama2c(place))
        place.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}: free some space, or choose another place") from None
    finally:
        place.unlink(missing_ok=True)
    if isinstance(weights.tokenizer, SentencePieceTokenizer):
        output.with_suffix(".tokenizer.bin").write_bytes(_tokenizer_file(weights.tokenizer))
    return compared


def _check(weights: Weights, possible: ModelConfig) -> None:
    ours, theirs = meaning(weights.config), meaning(possible)
    wrong = [f"model.{key} = {ours[key]}, llama2.c has {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key)]
    if wrong:
        raise UserError(f"{weights.name}: no model of llama2.c: {wrong[0]}: write it with --to weights or --to huggingface")


def _blocks(weights: Weights) -> Iterator[Tensor]:
    config, entries = weights.config, {entry.name: entry for entry in weights.parts}
    for place, name in _names(config):
        yield place.layout.join([entries[name].values()], config)[0]
    width = config.head_features
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(config.positions, dtype=torch.float32)[:, None] * frequencies
    yield from (angles.cos(), angles.sin())
    if not config.tie_embeddings:
        yield entries["head.output.weight"].values()


def _tokenizer_file(tokenizer: SentencePieceTokenizer) -> bytes:
    """The largest length of a token, then each token's score, length and bytes."""
    tokens = [piece.encode() for piece in tokenizer.pieces()]
    for special in (tokenizer.bos, tokenizer.eod):
        if special is not None:
            tokens[special] = b"\n" + tokens[special] + b"\n"
    lines = [struct.pack("<fi", score, len(token)) + token for score, token in zip(tokenizer.scores(), tokens, strict=True)]
    return struct.pack("<i", max(map(len, tokens))) + b"".join(lines)
