"""A real trained Llama (260 thousand parameters, SentencePiece) says word for word what its reference says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from teratron.checkpoint import LoadedModel, open_model
from teratron.data import load_tokenizer
from teratron.generate import Request, Sampling, complete, generate

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "ckpt_stories260k"


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hf_converted" / "golden_reference.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def stories(folder: Path) -> LoadedModel:
    opened = open_model(folder / "hf_converted")
    return dataclasses.replace(opened, tokenizer=load_tokenizer(folder / "tok512.model"))


def test_greedy_text_is_the_golden_text(stories: LoadedModel, golden: dict[str, Any]) -> None:
    new = len(golden["greedy_ids_from_bos"]) - len(stories.tokenizer.encode(PROMPT)) - 1
    (done,) = complete(stories, [PROMPT], Request(Sampling(0), new))
    assert PROMPT + done.text == golden["greedy_text"]
    assert done.tokens == golden["greedy_ids_from_bos"][-new:]


def test_from_nothing_in_a_batch_it_says_the_same(stories: LoadedModel, golden: dict[str, Any]) -> None:
    texts = generate(stories, ["", PROMPT, "One day"], temperature=0, max_new_tokens=150)
    assert golden["greedy_text"].startswith(texts[0])
    assert golden["greedy_text"].startswith(PROMPT + texts[1])
    assert texts[2] == generate(stories, "One day", temperature=0, max_new_tokens=150)


def test_logits_are_the_golden_logits(folder: Path, golden: dict[str, Any]) -> None:
    model = open_model(folder / "hf_converted", dtype=torch.float64).model
    tokens = torch.tensor([golden["prompt_ids"]])
    with torch.no_grad():
        logits = model.head.output(model({"tokens": tokens, "positions": torch.arange(tokens.shape[1])[None]})["hidden"])[0]
    nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    torch.testing.assert_close(logits[-1], torch.tensor(golden["last_position_logits"], dtype=torch.float64), rtol=0, atol=1e-6)
    assert nll.item() == pytest.approx(golden["mean_nll_per_token"], abs=1e-6)
