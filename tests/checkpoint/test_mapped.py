"""Weights used where they lie in a file: the same numbers, and no second copy of them in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from teratron.checkpoint import Weights, open_model, open_weights, write_weights
from teratron.checkpoint.huggingface.writing import write_huggingface
from teratron.checkpoint.mapped import MappedFile, forget, joined
from teratron.checkpoint.stream import Entry, write_safetensors
from teratron.config import ModelConfig
from teratron.models import GPT, build_model, initialise, parts_of

LLAMA = ModelConfig(
    layers=2, hidden=32, heads=4, kv_heads=2, vocab_size=50, vocab_multiple=16, seq_length=16, bias=False, norm="rmsnorm",
    activation="swiglu", position="rope", tie_embeddings=False,
)  # fmt: skip
GPT2 = ModelConfig(layers=2, hidden=32, heads=4, vocab_size=50, vocab_multiple=16, seq_length=16, activation="gelu_tanh")


def weights_of(config: ModelConfig, dtype: torch.dtype) -> tuple[GPT, Weights]:
    """A model with random weights in memory, and these."""
    model = build_model(config, dtype=dtype)
    assert isinstance(model, GPT)
    initialise(model, 1)
    parameters = dict(model.named_parameters())
    values = {part.name: part.of(parameters[part.parameter]).detach() for part in parts_of(model)}
    return model.eval(), Weights(config, [Entry(n, dtype, v.shape, lambda v=v: v) for n, v in values.items()], None, "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("form", ["file", "folder"])
@torch.no_grad()
def test_what_is_stored_is_what_computes(tmp_path: Path, config: ModelConfig, dtype: torch.dtype, form: str) -> None:
    """A file of ours is used as it is, fused layers and all; of a folder what lies there as it is needed."""
    model, weights = weights_of(config, dtype)
    if form == "file":
        source = tmp_path / "weights.safetensors"
        write_weights(weights, source)
    else:
        source = tmp_path / "folder"
        write_huggingface(weights, source, 2**30)
    opened = open_model(source, dtype=dtype).model
    tokens = {"tokens": torch.arange(16)[None], "positions": torch.arange(16)[None]}
    expected = {part.name: part.of(dict(model.named_parameters())[part.parameter]) for part in parts_of(model)}
    parameters = dict(opened.named_parameters())
    assert all(torch.equal(part.of(parameters[part.parameter]), expected[part.name]) for part in parts_of(opened))
    assert torch.equal(opened(tokens)["hidden"], model(tokens)["hidden"])
    mapped = [name for name, parameter in parameters.items() if parameter.is_shared()]
    assert mapped == list(parameters) if form == "file" else "embedding.tokens.weight" in mapped
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert {parameter.dtype for parameter in open_model(source, dtype=other).model.parameters()} == {other}


def test_a_file_is_read_as_it_says(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.bfloat16), "b": torch.arange(6.0).view(2, 3), "c": torch.arange(6.0, 12).view(2, 3)}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [Entry(name, x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()], {"key": "value"})
    file = MappedFile(path)
    assert file.metadata == {"key": "value"}
    assert all(torch.equal(file.read(name), x) for name, x in tensors.items())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 64 == 56
    assert json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")["b"]["shape"] == [2, 3]
    with pytest.raises(ValueError, match="it holds no d"):
        file.read("d")


def test_neighbours_in_a_file_are_joined_without_a_copy(tmp_path: Path) -> None:
    path, rows = tmp_path / "x.safetensors", torch.arange(40.0).view(8, 5)
    parts = {"a": rows[:3], "b": rows[3:4], "c": rows[4:]}
    write_safetensors(path, [Entry(name, x.dtype, x.shape, lambda x=x: x) for name, x in parts.items()])
    a, b, c = map(MappedFile(path).read, "abc")
    whole, turned = joined([a, b, c]), joined([c, b, a])
    assert torch.equal(whole, rows)
    assert whole.data_ptr() == a.data_ptr()
    assert torch.equal(turned, torch.cat([rows[4:], rows[3:4], rows[:3]]))
    assert not turned.is_shared()
    assert torch.equal(a, rows[:3])  # what was forgotten comes again
    kept = torch.ones(2**16)
    forget(kept)
    assert kept.all()  # memory of no file is left alone


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory a process has of its own")
def test_opening_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    config = ModelConfig(layers=1, hidden=64, heads=4, vocab_size=300_000, seq_length=16)  # 77 MB in float32
    _, weights = weights_of(config, torch.float32)
    write_weights(weights, tmp_path / "weights.safetensors")
    del weights
    before = own_memory()
    opened = open_model(tmp_path / "weights.safetensors")
    assert own_memory() - before < 20 * 2**10
    assert sum(parameter.numel() for parameter in opened.model.parameters()) > 19e6


def own_memory() -> int:
    """KiB of this process that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_weights_are_found_whatever_their_order(tmp_path: Path) -> None:
    _, weights = weights_of(GPT2, torch.float32)
    write_weights(weights, tmp_path / "weights.safetensors")
    found = {entry.name: entry.values() for entry in open_weights(tmp_path / "weights.safetensors").parts}
    assert found.keys() == {entry.name for entry in weights.parts}
    assert all(torch.equal(found[entry.name], entry.values()) for entry in weights.parts)
