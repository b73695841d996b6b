"""Writing for others: in shards, gone on with after a kill, compared before it appears; tokenizers; llama2.c; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny, write_text

from teratron.checkpoint import open_weights
from teratron.checkpoint.huggingface import write_huggingface, writing
from teratron.checkpoint.llama2c import open_llama2c, write_llama2c
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.cli.main import main
from teratron.config import ModelConfig, UserError
from teratron.data.bpe import train_bpe
from teratron.data.open import save_tokenizer
from teratron.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from teratron.data.wordpiece import train_wordpiece
from teratron.models import build_model, parts_of
from teratron.train import Trainer

TEXT = ["the cat sat on the mat, quietly", "a mat sat on the cat", "the quiet cat"] * 20
LLAMA = {
    "layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "seq_length": 16, "vocab_size": 300, "norm": "rmsnorm",
    "activation": "swiglu", "position": "rope", "bias": False, "tie_embeddings": False,
}  # fmt: skip
TIED = {"layers": 2, "hidden": 16, "heads": 2, "seq_length": 16, "vocab_size": 300}


def made(tokenizer: Tokenizer | None = None, name: str = "weights", **keys: Any) -> Weights:
    """A model with random weights; keys: of `model.*`."""
    config = ModelConfig(**keys)
    draw = torch.Generator().manual_seed(1)
    parts = [(part.name, part.shape, torch.randn(part.shape, generator=draw) / 4) for part in parts_of(build_model(config, device="meta"))]
    return Weights(config, [Entry(part, torch.float32, shape, values.clone) for part, shape, values in parts], tokenizer, name)


def same(found: Weights, expected: Weights) -> bool:
    theirs = {entry.name: entry.values() for entry in found.parts}
    return all(torch.equal(theirs.pop(entry.name), entry.values()) for entry in expected.parts) and not theirs


def test_files_are_no_larger_than_asked_for_and_are_read_as_one(tmp_path: Path) -> None:
    weights = made(**LLAMA)
    compared = write_huggingface(weights, tmp_path / "out", 8000)
    assert compared.difference == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 8000 or len(load_file(file)) == 1 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert same(open_weights(tmp_path / "out"), weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_export_goes_on_with_the_files_that_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three complete files one is damaged: it is written again, with those that are missing."""
    written: list[str] = []
    plain = writing.write_safetensors

    def killed(path: Path, *arguments: Any) -> dict[str, Any]:
        written.append(path.name)
        if len(written) == 4:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        return plain(path, *arguments)

    monkeypatch.setattr(writing, "write_safetensors", killed)
    with pytest.raises(KeyboardInterrupt):
        write_huggingface(made(**LLAMA), tmp_path / "out", 8000)
    assert not (tmp_path / "out").exists()
    first, second, third, fourth = written
    (tmp_path / ".out.partial" / second).write_bytes(b"damaged")
    write_huggingface(made(**LLAMA), tmp_path / "out", 8000)
    assert second in written[4:]
    assert fourth in written[4:]
    assert not {first, third} & set(written[4:])
    assert same(open_weights(tmp_path / "out"), made(**LLAMA))


def test_what_is_left_of_another_export_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(writing, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_huggingface(made(name="another", **LLAMA), tmp_path / "out", 8000)
    other = dataclasses.replace(made(**LLAMA), parts=made(**LLAMA).cast(torch.float64).parts)
    write_huggingface(other, tmp_path / "out", 8000)
    assert same(open_weights(tmp_path / "out"), other)


def test_weights_that_come_out_otherwise_never_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the disk had changed a number."""
    plain = writing.open_huggingface

    def changed(folder: Path) -> Weights:
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
        return plain(folder)

    monkeypatch.setattr(writing, "open_huggingface", changed)
    with pytest.raises(UserError, match=r"not what was read: .* differs"):
        write_huggingface(made(**LLAMA), tmp_path / "out", 10**9)
    assert not (tmp_path / "out").exists()


def test_only_a_folder_of_the_kind_is_replaced(tmp_path: Path) -> None:
    write_huggingface(made(**LLAMA), tmp_path / "out", 10**9)
    with pytest.raises(UserError, match="add --overwrite"):
        write_huggingface(made(**TIED), tmp_path / "out", 10**9)
    write_huggingface(made(**TIED), tmp_path / "out", 10**9, overwrite=True)
    assert open_weights(tmp_path / "out").config.norm == "layernorm"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        write_huggingface(made(**LLAMA), tmp_path / "home", 10**9, overwrite=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**TIED, "position": "sinusoidal"}, "the nearest, .* has model.position = learned, not sinusoidal: write it with --to weights"),
        ({**LLAMA, "rope_scaling": "ntk", "rope_factor": 2.0}, "LlamaForCausalLM has model.rope_scaling = none, not ntk"),
        ({**LLAMA, "window": 4, "dilation": 2}, "has model.dilation = 1, not 2"),
        ({**TIED, "family": "encoder"}, "BertForMaskedLM has model"),
    ],
)
def test_a_model_that_no_class_is_is_refused_by_key(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_huggingface(made(**keys), tmp_path / "out", 10**9)
    assert list(tmp_path.iterdir()) == []


TOKENIZERS = {
    "bytes": lambda: load_tokenizer("bytes"),
    "chars": lambda: CharTokenizer("".join(sorted(set("".join(TEXT)))) + "\n"),
    "bpe": lambda: train_bpe(TEXT, 270, ("[PAD]",)),
    "wordpiece": lambda: train_wordpiece(TEXT, 60),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_come_along(kind: str, tmp_path: Path) -> None:
    """The same ids for `AutoTokenizer` and for us."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")
    tokenizer, text = TOKENIZERS[kind](), "the cat\nsat on" if kind != "wordpiece" else "the cat sat on"
    tokenizer.chat_template = "{{ messages[0].content }}|"
    save_tokenizer(tokenizer, tmp_path / "kept")  # as a run keeps it
    write_huggingface(made(load_tokenizer(tmp_path / "kept"), **TIED), tmp_path / "out", 10**9)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), open_weights(tmp_path / "out").tokenizer
    ids = tokenizer.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text
    assert ours is not None
    assert (ours.encode(text), ours.decode(ids), ours.eod) == (ids, text, tokenizer.eod)
    assert theirs.eos_token_id == tokenizer.eod
    assert theirs.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello|"
    assert ours.chat_template == tokenizer.chat_template
    assert (theirs.mask_token_id == 4) == (kind == "wordpiece")


@pytest.mark.parametrize(
    ("said", "expected"),
    [("{{ a }}", "{{ a }}"), ([{"name": "tools", "template": "b"}, {"name": "default", "template": "c"}], "c"), (None, "")],
)
def test_a_chat_template_is_found_in_the_tokenizers_config(said: Any, expected: str, tmp_path: Path) -> None:
    save_tokenizer(TOKENIZERS["bpe"](), tmp_path / "kept")
    content = json.loads((tmp_path / "kept/tokenizer_config.json").read_text()) | {"chat_template": said}
    (tmp_path / "kept/tokenizer_config.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "kept").chat_template == expected
    (tmp_path / "kept/chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="its chat template cannot be read"):
        load_tokenizer(tmp_path / "kept")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    write_huggingface(made(load_tokenizer("bytes"), **TIED), tmp_path / "out", 10**9)
    (tmp_path / "out/tokenizer.json").unlink()
    CharTokenizer("".join(map(chr, range(100, 401)))).save(tmp_path / "out")
    with pytest.raises(UserError, match="its tokenizer has 301 ids, the model 'vocab_size' = 300"):
        open_weights(tmp_path / "out")


def test_roberta_without_its_padding_token_is_refused(tmp_path: Path) -> None:
    """RoBERTa gives token 1 no position."""
    keys = {**TIED, "family": "encoder", "norm_place": "post", "embedding_norm": True, "position_offset": 2, "token_types": 1}
    weights = made(load_tokenizer("bytes"), **keys, head_transform=True)
    with pytest.raises(UserError, match="its padding token is None, and RoBERTa"):
        write_huggingface(weights, tmp_path / "out", 10**9)
    write_huggingface(dataclasses.replace(weights, tokenizer=None), tmp_path / "bare", 10**9)
    assert same(open_weights(tmp_path / "bare"), weights)


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_files_come_back(tied: bool, tmp_path: Path) -> None:
    weights = made(**{**LLAMA, "tie_embeddings": tied})
    write_llama2c(weights, tmp_path / "model.bin")
    found = open_llama2c(tmp_path / "model.bin")
    assert same(found, weights)
    assert found.config == weights.config
    header = struct.unpack("<7i", (tmp_path / "model.bin").read_bytes()[:28])
    assert header == (16, 24, 2, 4, 2, 300 if tied else -300, 16)


def test_files_that_llama2c_cannot_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model of llama2\.c: model.norm = layernorm, llama2\.c has rmsnorm"):
        write_llama2c(made(**TIED), tmp_path / "model.bin")
    write_llama2c(made(**LLAMA), tmp_path / "model.bin")
    data = (tmp_path / "model.bin").read_bytes()
    for name, content, message in (
        ("short.bin", data[:-4], r"its header tells of [\d,]+: no llama2\.c file"),
        ("later.bin", struct.pack("<I", 0x616B3432) + data, "expected a llama2.c file of the first version"),
        ("zero.bin", bytes(100), "not a llama2.c file: its header says"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_weights(tmp_path / name)


def test_a_real_file_of_llama2c_is_written_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="its tokenizer is of SentencePiece: pip install sentencepiece")
    folder = shared / "data/ckpt_stories260k"
    weights = open_weights(folder / "stories260K.bin")
    assert same(weights, open_weights(folder / "hf_converted"))
    write_llama2c(weights, tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == (folder / "stories260K.bin").read_bytes()
    found, expected = (tokens_in(path.read_bytes()) for path in (tmp_path / "model.tokenizer.bin", folder / "tok512.bin"))
    # Single bytes are spelled out here, as llama2.c's own tokenizer.py does; that file has the bytes themselves.
    assert [found[place] for place in (0, 1, 2, *range(259, 512))] == [expected[place] for place in (0, 1, 2, *range(259, 512))]
    assert [token for _, token in found[3:259]] == [f"<0x{number:02X}>".encode() for number in range(256)]


def tokens_in(data: bytes) -> list[tuple[float, bytes]]:
    """Scores and tokens of a tokenizer.bin."""
    found, place = [], 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        found.append((score, data[place + 8 : place + 8 + length]))
        place += 8 + length
    return found


def test_a_run_goes_to_hugging_face_and_another_begins_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Continued pretraining: the first loss is the held-out loss of the weights that came."""
    text = write_text(tmp_path / "text.txt")
    keys = {"model__dropout": 0.0, "model__position": "rope", "model__norm": "rmsnorm", "model__activation": "swiglu", "model__bias": False}
    config = tiny(text, train__steps=4, **keys)
    Trainer(config, tmp_path / "run", device="cpu", echo=False).train()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "huggingface", "--shard-size", "2KB"]) == 0
    assert "parts are equal, logits of 8 tokens differ by at most 0" in capsys.readouterr().out
    kept = {entry.name: entry.values() for entry in open_weights(tmp_path / "run").parts}
    for source in ("out", "run"):
        going = tiny(text, train__steps=1, train__init=str(tmp_path / source), optim__lr=1e-30, optim__min_lr=0.0, **keys)
        Trainer(going, tmp_path / f"from-{source}", device="cpu", echo=False).train()
        begun = {entry.name: entry.values() for entry in open_weights(tmp_path / f"from-{source}").parts}
        assert all(torch.equal(begun[name], kept[name]) for name in kept), source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out"], "add --to weights|huggingface"),
        (["out", "--to", "huggingface", "--shard-size", "5 gigabytes"], "--shard-size 5 gigabytes: expected a number"),
        (["none/out", "--to", "huggingface"], "expected a folder to make, in a folder that exists"),
    ],
)
def test_unclear_commands_are_refused(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_huggingface(made(**LLAMA), tmp_path / "in", 10**9)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
