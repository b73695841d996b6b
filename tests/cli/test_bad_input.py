"""Bad input to `teratron train`: one line that names the thing and the way out, exit code 2, and a folder that is free for another try."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import options, write_text

from teratron.cli.main import main
from teratron.data.indexed import IndexedWriter
from teratron.data.tokenizer import load_tokenizer

Make = Callable[[Path], dict[str, Any]]
"""Puts bad input into a folder and returns the keys that lead to it."""


@pytest.fixture(autouse=True)
def _assumed_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teratron.train.trainer.measure_peak", lambda device, dtype: 1e11)


def refused(capfd: pytest.CaptureFixture[str], line: list[str]) -> str:
    """The error of a command line that ends as it should: one line on standard error, exit code 2."""
    capfd.readouterr()
    assert main(line) == 2
    err = capfd.readouterr().err
    assert err.startswith("teratron: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


def prepared(prefix: Path, tokens: int = 400, largest: int = 9, documents: int = 4) -> Path:
    """A data set as another tool writes it: without notes on its tokenizer."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in range(documents):
            writer.add_document(np.arange(document, document + tokens // documents) % (largest + 1))
    return prefix


def noted(prefix: Path, notes: str) -> Path:
    prepared(prefix)
    Path(f"{prefix}.json").write_text(notes)
    load_tokenizer("bytes").save(Path(f"{prefix}.tokenizer"))
    return prefix


def file(content: bytes | str, name: str = "input.txt", **keys: Any) -> Make:
    """A raw file as data.text."""

    def make(folder: Path) -> dict[str, Any]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"data__text": path, **keys}

    return make


def text(**keys: Any) -> Make:
    """Good text with bad keys."""
    return lambda folder: {"data__text": write_text(folder / "text.txt"), **keys}


def data(change: Callable[[Path], object] = lambda prefix: None, **keys: Any) -> Make:
    """A prepared data set, damaged in some way."""

    def make(folder: Path) -> dict[str, Any]:
        prefix = prepared(folder / "set", **{name: keys.pop(name) for name in ("tokens", "largest", "documents") if name in keys})
        change(prefix)
        return {"data__text": None, "data__train": prefix, "data__tokenizer": None, "model__vocab_size": 10, **keys}

    return make


def cut(suffix: str, size: int) -> Callable[[Path], object]:
    def change(prefix: Path) -> None:
        path = Path(prefix.with_name(prefix.name + suffix))
        path.write_bytes(path.read_bytes()[:size])

    return change


def overwrite(suffix: str, place: int, content: bytes) -> Callable[[Path], object]:
    def change(prefix: Path) -> None:
        path = Path(prefix.with_name(prefix.name + suffix))
        old = path.read_bytes()
        path.write_bytes(old[:place] + content + old[place + len(content) :])

    return change


CASES: dict[str, tuple[Make, list[str]]] = {
    "empty file": (file(""), ["input.txt", "training text is empty"]),
    "empty file for a BPE": (file("", data__tokenizer="bpe:300"), ["input.txt", "holds no text"]),
    "empty file in bytes": (file("", data__tokenizer="bytes"), ["input.txt", "no documents", "hold no text"]),
    "binary file": (file(b"abc\0def"), ["input.txt, byte 3", "binary: a NUL byte", "UTF-8"]),
    "binary file in bytes": (file(b"abc\0def", data__tokenizer="bytes"), ["input.txt, byte 3", "binary: a NUL byte"]),
    "invalid UTF-8": (file(b"caf\xe9 au lait"), ["input.txt, byte 3", "not UTF-8: byte 0xe9", "convert"]),
    "compressed file": (file(b"\x1f\x8b\x08abc"), ["input.txt", "compressed", "decompress"]),
    "malformed records": (file('{"text": "a"\n', name="a.jsonl"), ["a.jsonl, line 1", "not JSON"]),
    "records without the key": (file('{"body": "a"}\n', name="a.jsonl"), ["a.jsonl, line 1", "no key 'text'", "body", "text_key"]),
    "empty records": (file('{"text": ""}\n\n', name="a.jsonl", data__tokenizer="bytes"), ["a.jsonl", "no documents"]),
    "folder of unknown files": (
        lambda folder: {**file("x", name="in/a.xyz")(folder), "data__text": folder / "in", "data__tokenizer": "bytes"},
        ["/in: no documents", "no file with a known extension"],
    ),
    "missing file": (lambda folder: {"data__text": folder / "nowhere.txt"}, ["nowhere.txt", "no such file"]),
    "no data": (lambda folder: {"data__text": None}, ["no data", "--data.text", "--data.train"]),
    "too short": (file("abc " * 10, model__seq_length=64), ["36 tokens", "model.seq_length = 64 needs 65", "lower model.seq_length"]),
    "too short, all of it": (data(data__valid="{set}", model__seq_length=1000), ["400 tokens", "needs 1001"]),
    "positions": (text(model__max_positions=4), ["model.seq_length = 8 exceeds model.max_positions = 4", "lower the first"]),
    "no training share": (text(data__split="0,100"), ["nothing is left for training with data.split = '0,100'"]),
    "split of words": (text(data__split="most"), ["data.split = 'most'", "'98,2,0'"]),
    "split of dots": (text(data__split="1..2,3"), ["data.split = '1..2,3'", "'98,2,0'"]),
    "split of nothing": (text(data__split="0,0"), ["data.split = '0,0'", "'98,2,0'"]),
    "split in four": (text(data__split="1,1,1,1"), ["data.split = '1,1,1,1'"]),
    "small vocabulary": (text(model__vocab_size=5), ["model.vocab_size = 5 is smaller than the tokenizer's", "leave it out"]),
    "damaged tokenizer": (
        lambda folder: {**text()(folder), "data__tokenizer": write_text(folder / "tokenizer.json")},
        ["tokenizer.json"],
    ),
    "missing tokenizer": (text(data__tokenizer="nowhere.json"), ["nowhere.json", "no such file or folder", "bytes"]),
    "misspelt size": (text(data__tokenizer="bpe:many"), ["data.tokenizer = 'bpe:many'", "bpe:8192"]),
    "misspelt alphabet": (text(data__tokenizer="chars:9"), ["data.tokenizer = 'chars:9'", "expected chars"]),
    "small BPE": (text(data__tokenizer="bpe:100"), ["data.tokenizer = 'bpe:100'", "vocab size = 100: expected at least 257"]),
    "no end of document": (text(data__isolate_documents=True), ["data.isolate_documents = true", "end-of-document"]),
    "truncated .bin": (data(cut(".bin", 100)), ["set.bin holds 100 bytes", "cut short", "data prepare"]),
    "truncated .idx": (data(cut(".idx", 50)), ["set.idx", "not a whole index"]),
    "corrupt .idx": (data(overwrite(".idx", 0, b"GARBAGE")), ["set.idx", "not a whole index", "GARBAGE"]),
    "corrupt lengths": (data(overwrite(".idx", 34, b"\xff\xff\xff\xff")), ["set.idx", "not a whole index"]),
    "zero documents": (data(lambda prefix: empty_index(prefix)), ["set.idx", "holds no documents"]),
    "missing .bin": (data(lambda prefix: Path(f"{prefix}.bin").unlink()), ["set.bin", "missing beside set.idx"]),
    "missing data set": (
        lambda folder: {**data()(folder), "data__train": folder / "sett"},
        ["sett: no prepared dataset of that name", "did you mean 'set'"],
    ),
    "raw text as a data set": (
        lambda folder: {**data()(folder), "data__train": write_text(folder / "t.txt")},
        ["t.txt: is not a prepared dataset", "data.text"],
    ),
    "other vocabulary": (data(largest=99), ["holds token 99, the model has 10", "set model.vocab_size"]),
    "unknown vocabulary": (data(model__vocab_size=None), ["model.vocab_size = 0", "set data.tokenizer or model.vocab_size"]),
    "alphabet for a data set": (data(data__tokenizer="chars"), ["data.tokenizer = 'chars' is trained on raw text"]),
    "other tokenizer": (
        lambda folder: {
            **data()(folder),
            "data__train": noted(folder / "noted", '{"tokenizer": {"fingerprint": "x"}}'),
            "model__vocab_size": None,
        },
        ["noted was prepared with another tokenizer", "prepare it again"],
    ),
    "damaged notes": (
        lambda folder: {**data()(folder), "data__train": noted(folder / "noted", "{"), "model__vocab_size": None},
        ["noted.json: damaged", "remove this file"],
    ),
    "both kinds of data": (lambda folder: {**data()(folder), **text()(folder)}, ["data.text and data.train are both set"]),
    "steps": (text(train__steps="2.5"), ["train.steps = '2.5'", "integer"]),
    "unknown key": (text(model__layer=3), ["unknown key '--model.layer'", "did you mean 'model.layers'"]),
    "wrong type": (text(model__layers="many"), ["model.layers = 'many': expected integer"]),
    "batch": (text(train__micro_batch=3), ["train.global_batch = 4 is not divisible by train.micro_batch = 3"]),
}


def empty_index(prefix: Path) -> None:
    with IndexedWriter(prefix.with_name("other"), np.uint16) as writer:
        writer.add_document(np.arange(3))
    head = Path(f"{prefix}.idx").read_bytes()[:18]
    Path(f"{prefix}.idx").write_bytes(head + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + (0).to_bytes(8, "little"))


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_line_that_helps(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, parts = CASES[case]
    keys = {name: str(value).format(set=tmp_path / "set") if value is not None else None for name, value in make(tmp_path).items()}
    message = refused(capfd, ["train", *options(**keys), "--run", str(tmp_path / "run"), "--device", "cpu"])
    for part in parts:
        assert part in message
    assert not (tmp_path / "run" / "config.toml").exists(), "the corrected command may have any keys"
    good = options(data__text=write_text(tmp_path / "good.txt"), train__steps=1)
    assert main(["train", *good, "--run", str(tmp_path / "run"), "--device", "cpu"]) == 0, "in the same folder"


@pytest.mark.parametrize(("name", "tokenizer", "size"), [("long.jsonl", "chars", 70_000_000), ("long.txt", "bpe:300", 100_000_000)])
def test_a_line_of_100_megabytes(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, tokenizer: str, size: int) -> None:
    line = b"a" * size
    (tmp_path / name).write_bytes(b'{"text": "' + line + b'"}\n' if name.endswith(".jsonl") else line)
    keys = options(data__text=tmp_path / name, data__tokenizer=tokenizer)
    message = refused(capfd, ["train", *keys, "--run", str(tmp_path / "run"), "--device", "cpu"])
    for part in (name, "too long"):
        assert part in message


def test_a_run_that_holds_another_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["train", *options(data__text=write_text(tmp_path / "text.txt")), "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(line) == 0
    message = refused(capfd, [*line, "--optim.weight_decay=0.5"])
    for part in (str(tmp_path / "run"), "optim.weight_decay = 0.1, now 0.5", "--fork NEWDIR"):
        assert part in message
    assert main(line) == 0, "the run itself is as it was"


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_a_run_folder_that_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    text = write_text(tmp_path / "text.txt")
    run = text if kind == "file" else text / "run"
    message = refused(capfd, ["train", *options(data__text=text), "--run", str(run), "--device", "cpu"])
    assert f"--run {run}: cannot be written" in message
    assert "choose another folder" in message


def test_a_run_folder_without_permission(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "locked").mkdir(mode=0o555)
    try:
        (tmp_path / "locked" / "probe").touch()
    except PermissionError:
        message = refused(capfd, ["train", *options(data__text=text), "--run", str(tmp_path / "locked" / "run"), "--device", "cpu"])
        assert "cannot be written: Permission denied" in message
    else:
        pytest.skip("this user may write anywhere")


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither trained into nor cleaned up, though it has names that a run has."""
    load_tokenizer("bytes").save(tmp_path / "mine" / "tokenizer")
    keys = options(data__text=write_text(tmp_path / "text.txt"))
    message = refused(capfd, ["train", *keys, "--run", str(tmp_path / "mine"), "--device", "cpu"])
    assert "holds a tokenizer or data that no run made" in message
    assert (tmp_path / "mine" / "tokenizer" / "bytes.json").is_file()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["shakespear-char"], ["no preset or file 'shakespear-char' (did you mean 'shakespeare-char'?)"]),
        (["a" * 300], ["aaa: File name too long"]),
        (["nowhere.toml"], ["nowhere.toml: no such config file"]),
        (["{here}/bad.toml"], ["bad.toml: not a readable TOML file"]),
        (["--device", "tpu"], ["--device tpu: expected auto, cpu or cuda"]),
        (["--device", "cuda"], ["--device cuda: no CUDA device", "use --device cpu"]),
        (["--fork", "{here}/new"], ["has no checkpoint to branch off"]),
        (["--steps", "3"], ["unknown option '--steps'", "did you mean '--train.steps'"]),
    ],
)
def test_words_that_lead_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "bad.toml").write_text("[model\n")
    keys = options(data__text=write_text(tmp_path / "text.txt"))
    message = refused(capfd, ["train", *(word.format(here=tmp_path) for word in words), *keys, "--run", str(tmp_path / "run")])
    for part in parts:
        assert part in message


def test_a_run_without_its_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "--run" in refused(capfd, ["train", *options(data__text=write_text(tmp_path / "text.txt"))])


@pytest.mark.parametrize("name", ["config.toml", "tokenizer/chars.json", "data/text.idx", "data/text.bin"])
def test_a_run_whose_files_were_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    line = ["train", *options(data__text=write_text(tmp_path / "text.txt")), "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(line) == 0
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:5])
    assert name in refused(capfd, line)


def test_what_a_failed_attempt_left_is_not_used(tmp_path: Path) -> None:
    """The first attempt prepares its text and is then refused; the second has another text and another tokenizer."""
    first, second = write_text(tmp_path / "first.txt", words=24), write_text(tmp_path / "second.txt", seed=1)
    run = ["--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", *options(data__text=first, model__seq_length=500), *run]) == 2
    assert (tmp_path / "run" / "data" / "text.idx").is_file()
    assert main(["train", *options(data__text=second, data__tokenizer="bytes"), *run]) == 0
    notes = json.loads((tmp_path / "run" / "data" / "text.json").read_text())
    assert notes["tokenizer"]["kind"] == "bytes"
    assert notes["sources"][0]["path"] == str(second)


def test_a_text_that_grew_after_a_failed_attempt_is_read_again(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", words=24)
    line = ["train", *options(data__text=text, model__seq_length=500), "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(line) == 2
    write_text(text, words=1200)
    assert main(line) == 0
