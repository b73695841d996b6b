"""Guided text is always what was asked for, drawn or searched, with any kind of tokenizer, and says so where it cannot be."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teratron.checkpoint import LoadedModel
from teratron.config import ModelConfig, UserError
from teratron.data.bpe import train_bpe
from teratron.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from teratron.data.wordpiece import train_wordpiece
from teratron.generate import BeamSearch, Choices, Completion, ContrastiveSearch, JsonSchema, Regex, Request, Sampling, complete, generate
from teratron.models import build_model, initialise

WORDS = ["yes no perhaps 12 345 the cat is 7 years old", '{"name": "Tom", "age": 7}'] * 3
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
WAYS = [Sampling(0), Sampling(1.5, seed=3), Sampling(2.0, top_k=5, top_p=0.9), ContrastiveSearch(4), BeamSearch(3)]
SENTENCEPIECE = Path(__file__).parents[3] / "shared/data/tok_sentencepiece/test_model.model"


def metaspace() -> Tokenizer:
    """A BPE as Llama's: spaces are U+2581, one stands before every text, and bytes stand for what is not in the vocabulary."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers

    from teratron.data.tok_huggingface import HuggingFaceTokenizer

    pieces = ["<unk>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", *"yesno0123456789", "\u2581y", "es"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    engine = Engine(models.BPE(vocab, [("\u2581", "y"), ("e", "s")], unk_token="<unk>", byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<unk>", "</s>"])
    return HuggingFaceTokenizer(engine)


def sentencepiece() -> Tokenizer:
    if not SENTENCEPIECE.is_file():
        pytest.skip("needs ../shared/data/tok_sentencepiece")
    return load_tokenizer(SENTENCEPIECE)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "chars": lambda: CharTokenizer("".join(map(chr, range(32, 127)))),
    "bpe": lambda: train_bpe(WORDS, 300),
    "metaspace": metaspace,
    "sentencepiece": sentencepiece,
    "wordpiece": lambda: train_wordpiece(WORDS, 60),
}
SPELLED = ["bytes", "chars", "bpe", "metaspace", "sentencepiece"]


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return TOKENIZERS[kind]()


def model_for(tokenizer: Tokenizer) -> LoadedModel:
    config = ModelConfig(layers=1, hidden=16, heads=2, seq_length=128, vocab_size=tokenizer.vocab_size, position="rope", init_std=0.3)
    model = build_model(config, dtype=torch.float64)
    initialise(model, 1)
    return LoadedModel(model.eval(), config, tokenizer, "small")


def guided(loaded: LoadedModel, how: Any, constraint: Any, new: int = 90) -> list[Completion]:
    return list(complete(loaded, ["12 yes", "7"], Request(how, new, constraint=constraint)))


@pytest.mark.parametrize("kind", SPELLED)
def test_token_bytes_add_up_to_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = " yes no 12 is the cat,"
    spelled = tokenizer.token_bytes()
    assert len(spelled) == tokenizer.vocab_size
    joined = b"".join(spelled[token] or b"?" for token in tokenizer.encode(text)).decode()
    assert joined.lstrip() == tokenizer.decode(tokenizer.encode(text)).lstrip() == text.lstrip()
    if tokenizer.eod is not None:
        assert spelled[tokenizer.eod] is None


@pytest.mark.parametrize("kind", SPELLED)
def test_text_matches_the_expression_as_a_whole(kind: str) -> None:
    pytest.importorskip("llguidance")
    loaded = model_for(tokenizer_of(kind))
    for how in WAYS:
        for done in guided(loaded, how, Regex("(yes|no), [0-9]{2,4}(;|[.])")):
            assert re.fullmatch(" ?(yes|no), [0-9]{2,4}[;.]", done.text), how
            assert done.finished


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "metaspace"])
def test_text_is_json_of_the_schema(kind: str) -> None:
    pytest.importorskip("llguidance")
    loaded = model_for(tokenizer_of(kind))
    for how in (Sampling(seed=1), BeamSearch(2)):
        for done in guided(loaded, how, JsonSchema(SCHEMA)):
            if not done.finished:
                continue  # digits may go on for longer than there is room
            value = json.loads(done.text)
            assert set(value) == {"name", "ages"}
            assert len(value["name"]) <= 6
            assert all(isinstance(age, int) for age in value["ages"])
            assert done.text.strip() == json.dumps(value, ensure_ascii=False) or "\\" in done.text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_is_one_of_the_choices(kind: str) -> None:
    loaded = model_for(tokenizer_of(kind))
    for how in WAYS:
        for done in guided(loaded, how, Choices(("yes", "no", "perhaps"))):
            assert done.text.strip() in ("yes", "no", "perhaps"), how
            assert done.finished


def test_a_choice_is_drawn_as_often_as_the_model_says(loaded: LoadedModel) -> None:
    """The first bytes of the choices differ, so the model's probability of these decides."""
    with torch.no_grad():
        hidden = loaded.model({"tokens": torch.tensor([[72, 105]]), "positions": torch.tensor([[0, 1]])})["hidden"]
        likely = loaded.model.head.output(hidden)[0, -1, [ord("y"), ord("n")]].softmax(-1)
    request = Request(Sampling(), samples=400, batch=100, constraint=Choices(("yes", "no")))
    share = sum(done.text == "yes" for done in complete(loaded, ["Hi"], request)) / 400
    assert share == pytest.approx(float(likely[0]), abs=0.1)


def test_text_may_end_where_the_expression_does(loaded: LoadedModel) -> None:
    pytest.importorskip("llguidance")
    request = Request(Sampling(), 60, samples=30, constraint=Regex("[0-9]+"))
    lengths = {len(done.text) for done in complete(loaded, ["Hi"], request) if done.finished}
    assert len(lengths) > 1, "the end of a text competes with one more digit"


def test_rows_are_guided_each_by_its_own(loaded: LoadedModel) -> None:
    pytest.importorskip("llguidance")
    prompts = ["Hi", "The cat sat on the", "x"]
    together = generate(loaded, prompts, seed=4, regex="(a|bc|def){3,9};", max_new_tokens=40)
    assert together == [generate(loaded, prompt, seed=4, regex="(a|bc|def){3,9};", max_new_tokens=40) for prompt in prompts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "[0-9"}, "regex = '\\[0-9': .*error: unclosed character class: correct it, or leave it out"),
        ({"json_schema": "{"}, "json_schema: not JSON"),
        ({"json_schema": "[]"}, "json_schema: a JSON list, expected an object"),
        ({"json_schema": {"type": "thing"}}, "json_schema: .*Invalid type: thing"),
        ({"regex": "a", "choices": ["b"]}, "choices and regex are both given: keep one"),
        ({"choices": [""]}, "choices = \\[''\\]: expected texts"),
    ],
)
def test_what_cannot_be_followed_is_refused(loaded: LoadedModel, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(UserError, match=message) as error:
        generate(loaded, "Hi", **options)
    assert "\n" not in str(error.value)


def test_what_a_tokenizer_cannot_write_is_refused() -> None:
    pytest.importorskip("llguidance")
    words = model_for(tokenizer_of("wordpiece"))
    with pytest.raises(UserError, match="tokens of this wordpiece tokenizer stand for different text in different places"):
        generate(words, "yes", regex="[0-9]+")
    with pytest.raises(UserError, match="choice 'Yes': this wordpiece tokenizer makes 'yes' of it: give it as that"):
        generate(words, "yes", choices=["Yes"])
    digits = model_for(CharTokenizer("0123456789ab"))
    with pytest.raises(UserError, match="choice 'a' begins another, and this tokenizer has no token that ends a text"):
        generate(digits, "1", choices=["ab", "a"])
    braces = model_for(CharTokenizer('0123456789"ab'))
    with pytest.raises(UserError, match=r"this tokenizer cannot write what was asked for \(.*\): loosen the constraint"):
        generate(braces, "1", json_schema=SCHEMA)
    with pytest.raises(UserError, match="no token of this vocabulary goes on with what was asked for"):
        generate(digits, "1", regex="[x-z]+")


def test_without_the_package_it_says_what_to_install(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs the llguidance package: pip install llguidance"):
        generate(loaded, "Hi", regex="[0-9]+")
