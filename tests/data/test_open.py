"""Opening the data of a run: raw text with each kind of tokenizer, prepared sets with what is known of theirs, held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny, write_text

from teratron.config import Config, UserError
from teratron.data.indexed import IndexedDataset, IndexedWriter
from teratron.data.open import TrainingData, open_data
from teratron.data.prepare import prepare
from teratron.data.tokenizer import ByteTokenizer, load_tokenizer


def opened(config: Config, run: Path, said: list[str] | None = None) -> TrainingData:
    return open_data(config, run, (6,), said.append if said is not None else lambda text: None)


def bytes_set(prefix: Path, text: Path) -> Path:
    """A data set as `teratron data prepare` makes it."""
    prepare([text], prefix, ByteTokenizer(), workers=1)
    return prefix


def plain_set(prefix: Path, documents: int = 3) -> Path:
    """A data set that does not say what made it."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(np.arange(100))
    return prefix


def prepared_config(prefix: Path, **keys: Any) -> Config:
    return tiny("", **({"data__text": (), "data__train": (str(prefix),), "data__tokenizer": ""} | keys))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("spec", "kind", "vocab_size", "has_eod"), [("chars", "chars", 16, False), ("bytes", "bytes", 257, True), ("bpe:270", "bpe", 270, True)]
)
def test_raw_text_is_prepared_with_each_kind_of_tokenizer(
    text: Path, tmp_path: Path, spec: str, kind: str, vocab_size: int, has_eod: bool
) -> None:
    data = opened(tiny(text, data__tokenizer=spec), tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert (tokenizer.kind, data.special.vocab_size, data.special.eod is not None) == (kind, vocab_size, has_eod)
    tokens = IndexedDataset(tmp_path / "run" / "data" / "text").tokens
    if has_eod:
        assert tokens[-1] == data.special.eod
        tokens = tokens[:-1]
    assert tokenizer.decode(tokens.tolist()) == text.read_text()
    assert data.train_tokens + data.valid_tokens + 1 == len(tokens) + has_eod, "the first held-out token is no target"


def test_the_tokenizer_may_be_a_file(text: Path, tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path / "mine")
    data = opened(tiny(text, data__tokenizer=str(tmp_path / "mine" / "bytes.json")), tmp_path / "run")
    assert data.special.vocab_size == 257


def test_without_a_word_the_tokenizer_is_a_bpe_of_the_model_s_size(text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    data = opened(tiny(text, data__tokenizer="", model__vocab_size=280), tmp_path / "run", said)
    assert said[0] == "training a byte-level BPE tokenizer of 280 tokens on data.text"
    assert data.special.vocab_size == 280


def test_a_model_may_have_more_ids_than_the_tokenizer(text: Path, tmp_path: Path) -> None:
    assert opened(tiny(text, model__vocab_size=64), tmp_path / "run").special.vocab_size == 64


def test_the_second_time_nothing_is_prepared(text: Path, tmp_path: Path) -> None:
    first = opened(tiny(text), tmp_path / "run")
    stamp = (tmp_path / "run" / "data" / "text.bin").stat().st_mtime_ns
    said: list[str] = []
    again = opened(tiny(text), tmp_path / "run", said)
    assert said == []
    assert (tmp_path / "run" / "data" / "text.bin").stat().st_mtime_ns == stamp
    index = np.arange(50)
    assert np.array_equal(first.train.rows(index), again.train.rows(index))


def test_folders_and_several_files_are_one_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = [write_text(tmp_path / "in" / f"{name}.txt", words=60, seed=seed) for seed, name in enumerate("ab")]
    folder = opened(tiny(tmp_path / "in"), tmp_path / "one")
    files = opened(tiny("", data__text=tuple(map(str, texts))), tmp_path / "two")
    assert np.array_equal(folder.train.rows(np.arange(9)), files.train.rows(np.arange(9)))
    assert IndexedDataset(tmp_path / "one" / "data" / "text").document_count == 2


def test_a_prepared_set_brings_its_tokenizer(text: Path, tmp_path: Path) -> None:
    data = opened(prepared_config(bytes_set(tmp_path / "set", text)), tmp_path / "run")
    assert (data.special.vocab_size, data.special.eod) == (257, 256)
    assert load_tokenizer(tmp_path / "run" / "tokenizer").kind == "bytes", "the run can be used without the data"


def test_a_set_that_says_nothing_needs_a_size_or_a_tokenizer(tmp_path: Path) -> None:
    prefix = plain_set(tmp_path / "set")
    assert opened(prepared_config(prefix, model__vocab_size=100), tmp_path / "a").special.eod is None
    assert opened(prepared_config(prefix, data__tokenizer="bytes"), tmp_path / "b").special.eod == 256
    with pytest.raises(UserError, match=r"set data\.tokenizer or model\.vocab_size"):
        opened(prepared_config(prefix), tmp_path / "c")


def test_sets_of_different_tokenizers_are_refused_wherever_they_stand(text: Path, tmp_path: Path) -> None:
    ours, theirs = bytes_set(tmp_path / "ours", text), tmp_path / "theirs"
    tokenizer_run = tmp_path / "chars"
    opened(tiny(text), tokenizer_run)
    prepare([text], theirs, load_tokenizer(tokenizer_run / "tokenizer"), workers=1, append_eod=False)
    for keys in (
        {"data__train": (str(ours), str(theirs))},
        {"data__train": (str(ours),), "data__valid": (str(theirs),)},
        {"data__train": (str(theirs),), "data__tokenizer": "bytes"},
    ):
        with pytest.raises(UserError, match="theirs was prepared with another tokenizer"):
            opened(prepared_config(ours, **keys), tmp_path / "run")


def test_held_out_sets_leave_all_the_rest_for_training(text: Path, tmp_path: Path) -> None:
    train, valid = bytes_set(tmp_path / "train", text), bytes_set(tmp_path / "valid", write_text(tmp_path / "v.txt", words=48, seed=3))
    data = opened(prepared_config(train, data__valid=(str(valid),)), tmp_path / "run")
    assert data.train_tokens == IndexedDataset(train).total_tokens
    assert data.valid_tokens == IndexedDataset(valid).total_tokens - 1
    assert data.valid is not None
    rows = data.valid.rows(np.arange(data.valid.count))
    assert np.array_equal(rows[:, 1:][rows[:, 1:] >= 0], IndexedDataset(valid).tokens[1:])


def test_a_held_out_set_of_one_token_is_refused(text: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "one", np.uint16) as writer:
        writer.add_document(np.arange(1))
    config = prepared_config(bytes_set(tmp_path / "set", text), data__valid=(str(tmp_path / "one"),))
    with pytest.raises(UserError, match="holds fewer than 2 tokens"):
        opened(config, tmp_path / "run")


def test_a_tokenizer_already_in_a_run_is_never_trained_again(text: Path, tmp_path: Path) -> None:
    """A run's weights belong to its tokenizer, whatever has become of the text."""
    opened(tiny(text), tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text("")
    before = (tmp_path / "run" / "tokenizer" / "chars.json").read_text()
    text.unlink()
    opened(tiny(text), tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "chars.json").read_text() == before


def test_what_malformed_records_cost_is_said(tmp_path: Path) -> None:
    lines = ['{"text": "the cat sat on the mat, quietly"}'] * 9 + ["nonsense"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    opened(tiny(tmp_path / "a.jsonl"), tmp_path / "run", said)
    assert "1 rejected (1 not JSON)" in said[-1]


def test_a_run_folder_without_room_is_a_sentence(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keys: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("teratron.data.tokenizer.CharTokenizer.save", full)
    with pytest.raises(UserError, match="the data cannot be prepared here: No space left on device; free space"):
        opened(tiny(text), tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer").exists()
