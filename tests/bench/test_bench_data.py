"""The benchmark of data prepares the same tokens in every way, and names a rate for each."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # its scripts find each other so when run by path

import data
import numpy as np
import pytest

from teratron.data.bpe import train_bpe
from teratron.data.indexed import IndexedDataset
from teratron.data.prepare import prepare


def test_every_way_has_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "VOCABULARY", 300)
    monkeypatch.setattr(data, "DRAWS", 1)
    found = data.measure(tmp_path, 1, 1)
    assert len(found) == 6
    assert all(rate > 0 for rate in found.values())


def test_the_plain_loop_makes_our_tokens(tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "text.jsonl", train_bpe(["some text, and some more"], 270)
    data.write_documents(source, "some more text. " * 1000, 1)
    prepare([source], tmp_path / "ours", tokenizer, append_eod=False, workers=1)
    data.plain_loop(source, tmp_path / "plain", tokenizer)
    ours, plain = (IndexedDataset(tmp_path / name) for name in ("ours", "plain"))
    assert np.array_equal(ours.tokens, plain.tokens)
