"""The public face: prompts in, texts out; seeds, samples, stops and refusals."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math

import pytest
import torch

import teratron
from teratron.checkpoint import LoadedModel
from teratron.config import UserError
from teratron.data.tokenizer import ByteTokenizer, Tokenizer
from teratron.generate import Decoder, Request, Sampling, TokenStream, complete, generate
from teratron.generate.frame import frame_of

PROMPTS = ["Hi", "The cat sat on the", "", "é"]


class WithBos(ByteTokenizer):
    """Bytes with a token for the start of a text."""

    bos = 255


class Endless(ByteTokenizer):
    """Bytes without a token for the end of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.eod = None


def read(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return frame_of("gpt", "next_token", tokenizer).read(prompt)


def with_tokenizer(loaded: LoadedModel, tokenizer: Tokenizer | None) -> LoadedModel:
    return dataclasses.replace(loaded, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"seed": 5}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "seed": 2}], ids=str
)
def test_many_prompts_give_what_single_ones_give(loaded: LoadedModel, settings: dict[str, float]) -> None:
    alone = [generate(loaded, prompt, max_new_tokens=30, **settings) for prompt in PROMPTS]
    assert all(isinstance(text, str) and text for text in alone)
    for batch in (1, 3, 16):
        assert generate(loaded, PROMPTS, max_new_tokens=30, batch=batch, **settings) == alone


def test_seeds_repeat_and_differ(loaded: LoadedModel) -> None:
    texts = [generate(loaded, "Hi", seed=seed) for seed in range(5)]
    assert texts == [generate(loaded, "Hi", seed=seed) for seed in range(5)]
    assert len(set(texts)) == 5


def test_sample_number_i_has_seed_plus_i(loaded: LoadedModel) -> None:
    done = list(complete(loaded, ["Hi", "Ho"], Request(Sampling(seed=40), 12, samples=3, batch=4)))
    assert [(one.prompt, one.seed) for one in done] == [(prompt, seed) for prompt in ("Hi", "Ho") for seed in (40, 41, 42)]
    assert [one.text for one in done] == [generate(loaded, one.prompt, seed=one.seed, max_new_tokens=12) for one in done]


def test_text_is_what_the_tokens_decode_to(loaded: LoadedModel) -> None:
    (done,) = complete(loaded, ["Hi"], Request(Sampling(seed=1), 50))
    assert done.text == ByteTokenizer().decode(done.tokens)
    assert len(done.tokens) <= 50


def test_end_of_document_ends_the_text_and_is_not_in_it(loaded: LoadedModel) -> None:
    full = next(complete(with_tokenizer(loaded, Endless()), ["Hi"], Request(Sampling(0), 30)))
    end = full.tokens[8]
    tokenizer = ByteTokenizer()
    tokenizer.eod = end
    (done,) = complete(with_tokenizer(loaded, tokenizer), ["Hi"], Request(Sampling(0), 30))
    assert done.tokens == full.tokens[: full.tokens.index(end)]


def test_stop_text_ends_its_row_only(loaded: LoadedModel) -> None:
    full = generate(loaded, PROMPTS, max_new_tokens=30)
    stop = full[0][4:6]
    assert generate(loaded, PROMPTS, max_new_tokens=30, stop=stop) == [text.partition(stop)[0] for text in full]
    assert generate(loaded, "Hi", max_new_tokens=30, stop=["never seen", stop]) == full[0].partition(stop)[0]


def test_without_a_number_the_text_goes_as_far_as_positions_reach(loaded: LoadedModel) -> None:
    endless = with_tokenizer(loaded, Endless())
    lengths = [len(done.tokens) for done in complete(endless, ["x" * 60, "x" * 10], Request(Sampling(seed=3)))]
    assert lengths == [4, 54]


def test_prompts_start_with_bos_where_there_is_one() -> None:
    assert read(WithBos(), "ab") == [255, 97, 98]
    assert read(WithBos(), "") == [255]
    assert read(ByteTokenizer(), "ab") == [97, 98]
    assert read(ByteTokenizer(), "") == [256]


def test_bos_ends_a_text_since_the_next_document_begins(loaded: LoadedModel) -> None:
    full = next(complete(with_tokenizer(loaded, Endless()), ["Hi"], Request(Sampling(0), 30)))
    stream = TokenStream(Decoder(loaded.model, [read(ByteTokenizer(), "Hi")], 30), Sampling(0))
    assert [token for step in stream for _, token in step] == full.tokens
    tokenizer = WithBos()
    tokenizer.bos = full.tokens[8]
    (ended,) = complete(with_tokenizer(loaded, tokenizer), [read(ByteTokenizer(), "Hi")], Request(Sampling(0), 30))
    assert ended.finished
    assert ended.tokens == full.tokens[: full.tokens.index(tokenizer.bos)]


def test_package_is_callable_as_the_function_that_it_names(loaded: LoadedModel) -> None:
    package = importlib.import_module("teratron.generate")
    assert package(loaded, "Hi", seed=9) == generate(loaded, "Hi", seed=9) == teratron.generate(loaded, "Hi", seed=9)


def refusal(loaded: LoadedModel, prompts: str | list[str], **settings: object) -> str:
    with pytest.raises(UserError) as error:
        generate(loaded, prompts, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals_name_the_value_and_the_way_out(loaded: LoadedModel) -> None:
    assert "at most 63 tokens" in refusal(loaded, "x" * 64)
    assert "ask for at most 4" in refusal(loaded, "x" * 60, max_new_tokens=5)
    assert refusal(loaded, ["x", "x" * 80], max_new_tokens=5).startswith("prompt 2 of 2: the prompt has 80 tokens")
    assert "prompt is empty" in refusal(with_tokenizer(loaded, Endless()), "")
    assert "--tokenizer" in refusal(with_tokenizer(loaded, None), "Hi")
    assert "lone surrogate" in refusal(loaded, "a\ud800")
    assert "batch = 0" in refusal(loaded, "Hi", batch=0)
    assert "stop = ''" in refusal(loaded, "Hi", stop="")
    assert "open already" in refusal(loaded, "Hi", device="cpu")
    assert "temperature = -1" in refusal(loaded, "Hi", temperature=-1)


def test_sources_that_cannot_be_opened_are_refused(tmp_path: object) -> None:
    with pytest.raises(UserError, match="nothing-there"):
        generate(f"{tmp_path}/nothing-there", "Hi")
    with pytest.raises(UserError, match="--device tpu: expected"):
        generate(f"{tmp_path}", "Hi", device="tpu")
    with pytest.raises(UserError, match="precision = fp8"):
        generate(f"{tmp_path}", "Hi", precision="fp8")


def test_damaged_weights_are_refused(loaded: LoadedModel) -> None:
    weight = loaded.model.head.norm.weight  # type: ignore[union-attr]
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(math.nan)
        assert "not finite" in refusal(loaded, "Hi")
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_any_number_of_samples_begins_at_once(loaded: LoadedModel) -> None:
    request = Request(Sampling(temperature=0.9), max_new_tokens=2, samples=10**12, batch=2)
    first = list(itertools.islice(complete(loaded, ["Hi", "é"], request), 3))
    assert [(done.prompt, done.seed) for done in first] == [("Hi", 0), ("Hi", 1), ("Hi", 2)]
