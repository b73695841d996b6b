"""`teratron convert`: the file holds the weights, whole, however they were saved; it opens again; it never half exists."""

from __future__ import annotations

import json
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from held import cut_pieces, on_ranks, succeed, whole_pieces
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import Tensor
from torch.nn import Module

from teratron.checkpoint import TrainingState, open_model, save_training, stream, weights_file
from teratron.checkpoint.tensors import TensorFiles
from teratron.cli.main import main
from teratron.config import Config
from teratron.models import build_model, parts_of


def config(**keys: object) -> Config:
    return tiny("text.txt", model__vocab_size=11, **keys)


def training_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    parts = parts_of(build_model(config().model, device="meta"))
    return {f"{kind}/{part.name}": torch.randn(part.shape, generator=draw, dtype=dtype) for kind in ("weight", "moment1") for part in parts}


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weight/"): tensor for name, tensor in tensors.items() if name.startswith("weight/")}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint that three ranks have saved in pieces."""
    held = cut_pieces(training_state(), 3, random.Random(0))
    state = TrainingState(40)
    return succeed(on_ranks(3, lambda group: save_training(tmp_path / "run", config(), held[group.rank], state, group=group)))[0]


def test_the_file_holds_the_whole_weights(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.safetensors"
    assert main(["convert", str(saved), str(path)]) == 0
    told = capsys.readouterr().out
    assert f"wrote {path}: the weights of {saved}" in told
    assert "parts are equal, logits of" in told
    found, expected = load_file(path), weights_of(training_state())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["step"]) == ("teratron-weights", "40")
    assert json.loads(metadata["config"])["model"]["vocab_size"] == 11


def test_a_run_and_the_same_checkpoint_give_the_same_file(saved: Path, tmp_path: Path) -> None:
    for number, source in enumerate((saved, tmp_path / "run")):
        assert main(["convert", str(source), str(tmp_path / f"{number}.safetensors")]) == 0
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_numbers_of_another_type(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(stream, "_BLOCK", 100)
    path = tmp_path / "out.safetensors"
    assert main(["convert", str(saved), str(path), "--dtype", name]) == 0
    found, expected = load_file(path), weights_of(training_state())
    assert all(torch.equal(found[key], expected[key].to(dtype)) and found[key].dtype == dtype for key in expected)


def held_parts(model: Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {part.name: part.of(parameters[part.parameter]) for part in parts_of(model)}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_it_opens_as_the_same_model(tmp_path: Path, precision: str) -> None:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    folder = save_training(tmp_path, config(train__precision=precision), whole_pieces(training_state(dtype)), TrainingState(40))
    assert main(["convert", str(folder), str(tmp_path / "out.safetensors")]) == 0
    ours, theirs = (held_parts(open_model(source).model) for source in (folder, tmp_path / "out.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == dtype for name in ours)
    opened = open_model(tmp_path / "out.safetensors")
    assert opened.config == config().model
    assert "step 40" in opened.name
    assert opened.tokenizer is None


def test_generate_takes_the_file_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are the tokenizer here, so the model has 256 tokens and the end of a document."""
    from teratron.data.tokenizer import load_tokenizer

    made = tiny("text.txt", model__vocab_size=load_tokenizer("bytes").vocab_size)
    parts = parts_of(build_model(made.model, device="meta"))
    pieces = whole_pieces({f"weight/{part.name}": torch.zeros(part.shape) for part in parts})
    folder = save_training(tmp_path, made, pieces, TrainingState(40))
    path = tmp_path / "out.safetensors"
    assert main(["convert", str(folder), str(path)]) == 0
    command = ["generate", str(path), "a", "--max-new-tokens", "2", "--device", "cpu"]
    capsys.readouterr()
    assert main(command) == 2
    assert "give one with --tokenizer" in capsys.readouterr().err
    assert main([*command, "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_only_one_tensor_is_held_at_a_time(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is put together when its turn has come, and gone when the next one is; also when they are compared."""
    alive: list[weakref.ref[Any]] = []
    original = TensorFiles.read

    def watched(*arguments: object) -> Tensor:
        assert not any(reference() is not None for reference in alive), "the memory of the one before is still held"
        memory = original(*arguments).numpy().copy()  # type: ignore[arg-type]
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    monkeypatch.setattr(TensorFiles, "read", watched)
    assert main(["convert", str(saved), str(tmp_path / "out.safetensors")]) == 0
    assert len(alive) == 3 * len(weights_of(training_state()))  # written, compared, computed with


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_file_is_replaced_only_when_asked_to(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"precious")
    assert "add --overwrite" in refused(capsys, saved, path)
    assert path.read_bytes() == b"precious"
    assert main(["convert", str(saved), str(path), "--overwrite"]) == 0
    assert load_file(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.txt", "add --to weights"), ("none/out.safetensors", "a folder that exists"), ("run.safetensors", "expected a file")],
)
def test_places_that_cannot_be_written_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "run.safetensors").mkdir()
    assert message in refused(capsys, saved, tmp_path / name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "in out --to run --dtype bf16",
            "--dtype: has no effect with --to run, only with --to weights|huggingface|megatron|peft: leave it out",
        ),
        ("in out --to run --adapter x", "--adapter: has no effect with --to run"),
        ("in out --to run --upcycle 4", "--upcycle: has no effect with --to run"),
        ("in out --to run --overwrite", "--overwrite: has no effect with --to run"),
        ("in out --to peft --adapter x", "--adapter: has no effect with --to peft"),
        ("in out.bin --dtype=fp16", "--dtype: has no effect with --to llama2c"),
        ("in out.safetensors --format torch_dist", "--format: has no effect with --to weights, only with --to megatron"),
        ("in out --to huggingface --tensor 2", "--tensor: has no effect with --to huggingface"),
        ("in out --to huggingface --pipeline 2", "--pipeline: has no effect with --to huggingface"),
        ("in out --to megatron --shard-size 1GB", "--shard-size: has no effect with --to megatron"),
        ("in out.safetensors --output x", "--output: has no effect with --to weights, only with `args SCRIPT`"),
        ("in out.safetensors --experts-per-token 2", "without --upcycle: add --upcycle EXPERTS"),
        ("in", "OUTPUT is missing, such as `teratron convert in OUT.safetensors`"),
        ("args", "the launch script is missing, such as `teratron convert args train.sh`"),
        ("args train.sh --to megatron", "--to: has no effect with `args SCRIPT`"),
        ("args train.sh --overwrite", "add --output FILE"),
    ],
)
def test_options_without_an_effect_are_refused(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    """Before the source is looked for."""
    assert message in refused(capsys, *words.split())


def test_a_full_disk_leaves_the_former_file(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"precious")

    def full(partial: Path, *arguments: object) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file, "write_safetensors", full)
    assert "No space left on device" in refused(capsys, saved, path, "--overwrite")
    assert path.read_bytes() == b"precious"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out.safetensors", "run"]


def test_what_was_written_wrongly_does_not_appear(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(path: Path, entries: list[stream.Entry], metadata: dict[str, str]) -> None:
        stream.write_safetensors(path, [*entries[:-1], entries[-1]._replace(values=lambda: 2 * entries[-1].values())], metadata)

    monkeypatch.setattr(weights_file, "write_safetensors", careless)
    assert "differs; nothing was put in place: convert it again" in refused(capsys, saved, tmp_path / "out.safetensors")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run"]


def test_weights_of_a_run_that_broke_down_are_written_as_they_are(tmp_path: Path) -> None:
    tensors = training_state()
    tensors["weight/head.norm.weight"][3] = float("nan")
    folder = save_training(tmp_path, config(), whole_pieces(tensors), TrainingState(40))
    assert main(["convert", str(folder), str(tmp_path / "out.safetensors")]) == 0


def test_numbers_that_fp16_cannot_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = training_state()
    tensors["weight/head.norm.weight"][3] = -1e6
    folder = save_training(tmp_path, config(), whole_pieces(tensors), TrainingState(40))
    assert "head.norm.weight holds 1e+06" in refused(capsys, folder, tmp_path / "out.safetensors", "--dtype", "fp16")
    assert not (tmp_path / "out.safetensors").exists()
    assert main(["convert", str(folder), str(tmp_path / "out.safetensors"), "--dtype", "bf16"]) == 0


def test_a_damaged_checkpoint_is_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "checksum differs" in refused(capsys, saved, tmp_path / "out.safetensors")


METADATA = {"format": "teratron-weights", "version": "1", "step": "4", "config": "{}"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "give a file of `teratron convert`"),
        ({"format": "pt"}, "found format 'pt'"),
        (METADATA | {"version": "2"}, "version '2'"),
        (METADATA | {"step": "x"}, "hold no config and step"),
        (METADATA | {"config": "["}, "hold no config and step"),
        (METADATA | {"config": "[]"}, "hold no config and step"),
        (METADATA | {"config": '{"modle": {}}'}, "did you mean 'model'"),
        (METADATA | {"config": '{"model": {"vocab_size": 11}}'}, "weights missing"),
    ],
)
def test_files_of_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: dict[str, str], message: str) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors", metadata)
    assert main(["generate", str(tmp_path / "x.safetensors"), "a"]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    assert main(["generate", str(tmp_path / "x.safetensors"), "a"]) == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
