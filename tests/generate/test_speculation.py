"""Guessing ahead changes the speed and never the text: whoever guesses, the tokens are those of plain decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from teratron.checkpoint import LoadedModel
from teratron.config import UserError
from teratron.data.tokenizer import ByteTokenizer
from teratron.generate import (
    BeamSearch,
    Choices,
    Decoder,
    Draft,
    LookUp,
    ModelGuesser,
    Request,
    Sampling,
    SpeculativeStream,
    TextGuesser,
    TokenStream,
    complete,
    generate,
)
from teratron.models import Model

PROMPTS = [[72, 105], [256], [84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116], [10, 20, 30, 10, 20, 30, 10]]
GREEDY = Sampling(temperature=0)
WAYS = [GREEDY, Sampling(seed=7), Sampling(0.4, top_k=20, top_p=0.9, seed=3)]
NEW = 24


class Foretold:
    """Guesses what is told to come, with some tokens wrong: every way to accept and to reject occurs."""

    def __init__(self, rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> None:
        self.futures = [[*prompt, *row] for prompt, row in zip(prompts, rows, strict=True)]
        self.right = self.wrong = 0

    def guess(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [self._of(text, future, count) for text, future in zip(texts, self.futures, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        self.futures = [self.futures[row] for row in rows]

    def _of(self, text: Sequence[int], future: Sequence[int], count: int) -> list[int]:
        guess = list(future[len(text) : len(text) + len(text) % (count + 1)])
        if guess and len(text) % 3 == 0:
            place = len(text) % len(guess)
            guess[place] = (guess[place] + 1) % 257
            self.wrong += 1
        self.right += len(guess)
        return guess


def rows_of(stream: TokenStream, count: int = len(PROMPTS)) -> tuple[list[list[int]], int]:
    """Each row's tokens, and the number of steps."""
    rows: list[list[int]] = [[] for _ in range(count)]
    steps = 0
    for steps, step in enumerate(stream, 1):  # noqa: B007
        for row, token in step:
            rows[row].append(token)
    return rows, steps


def plain(model: Model, how: Sampling, **rest: object) -> list[list[int]]:
    return rows_of(TokenStream(Decoder(model, PROMPTS, NEW), how, **rest))[0]


SHAPES = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "window": ("llama", {"window": 5, "global_tokens": 2, "global_every": 2}),
    "alibi": ("llama", {"position": "alibi"}),
    "relative": ("llama", {"position": "relative"}),
    "latent": ("llama", {"latent": 8, "rope_dim": 4, "kv_heads": 4, "qk_norm": False}),
    "experts": ("llama", {"experts": 4, "experts_per_token": 2}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_guessed_never_changes_the_tokens(make_model: Callable[..., Model], name: str) -> None:
    style, keys = SHAPES[name]
    model = make_model(style, **keys)
    for how in WAYS:
        expected = plain(model, how)
        guesser = Foretold(expected, PROMPTS)
        rows, steps = rows_of(SpeculativeStream(Decoder(model, PROMPTS, NEW, rewinds=True), guesser, 5, how))
        assert rows == expected
        assert guesser.wrong > 3
        assert steps < NEW, "guesses that are right should save steps"


def test_a_prefix_seen_from_both_sides(make_model: Callable[..., Model]) -> None:
    model = make_model("llama")
    expected, _ = rows_of(TokenStream(Decoder(model, PROMPTS, NEW, both_sides=True), GREEDY))
    decoder = Decoder(model, PROMPTS, NEW, both_sides=True, rewinds=True)
    assert rows_of(SpeculativeStream(decoder, Foretold(expected, PROMPTS), 4, GREEDY))[0] == expected != plain(model, GREEDY)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_rows_end_where_they_would(model: Model, how: Sampling) -> None:
    full = plain(model, how)
    stop_ids = {full[0][6], full[2][2]}
    expected = plain(model, how, stop_ids=stop_ids)
    decoder = Decoder(model, PROMPTS, NEW, rewinds=True)
    stream = SpeculativeStream(decoder, Foretold(full, PROMPTS), 5, how, stop_ids)
    assert rows_of(stream)[0] == expected != full
    assert {row for row, tokens in enumerate(expected) if len(tokens) < NEW} == stream.finished


def test_rows_reach_the_last_position(model: Model) -> None:
    prompts = [[1] * 60, [2, 3]]
    expected, _ = rows_of(TokenStream(Decoder(model, prompts), GREEDY), 2)
    stream = SpeculativeStream(Decoder(model, prompts, rewinds=True), Foretold(expected, prompts), 8, GREEDY)
    assert rows_of(stream, 2)[0] == expected
    assert list(map(len, expected)) == [4, 62]


@pytest.mark.parametrize("seed", range(8))
def test_draft_model_and_look_up_on_many_weights(make_model: Callable[..., Model], seed: int) -> None:
    """The draft is the model with some noise, so that it is often right and often wrong."""
    torch.manual_seed(seed)
    model, small = make_model("gpt2"), make_model("gpt2")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    how = [GREEDY, Sampling(0.3, seed=seed)][seed % 2]
    expected = plain(model, how)
    guessers = (
        ModelGuesser(Decoder(small, PROMPTS, 1, rewinds=True), [NEW] * len(PROMPTS), how, [how.seed] * len(PROMPTS)),
        TextGuesser(len(PROMPTS)),
    )
    for guesser in guessers:
        assert rows_of(SpeculativeStream(Decoder(model, PROMPTS, NEW, rewinds=True), guesser, 4, how))[0] == expected


def test_a_model_that_guesses_for_itself_is_always_right(model: Model) -> None:
    for how in WAYS:
        drafter = Decoder(model, PROMPTS, 1, rewinds=True)
        guesser = ModelGuesser(drafter, [NEW] * len(PROMPTS), how, [how.seed] * len(PROMPTS))
        _, steps = rows_of(SpeculativeStream(Decoder(model, PROMPTS, NEW, rewinds=True), guesser, 3, how))
        assert steps == 1 + -(-(NEW - 1) // 4)


def test_look_up_finds_what_stood_behind_the_longest_end() -> None:
    guesser = TextGuesser(2)
    text = [1, 2, 3, 4, 5, 9, 3, 4, 7, 8, 2, 3, 4]
    assert guesser.guess([text, [5]], 4) == [[7, 8], []], "two tokens found twice: the last time counts, and as many are guessed"
    assert guesser.guess([[*text, 5], [5, 5]], 4) == [[9, 3, 4, 7], []], "four tokens found: four are guessed"
    guesser.keep([1])
    assert guesser.guess([[5, 5, 5, 5]], 4) == [[5]]


def test_texts_stops_and_constraints_are_those_without(loaded: LoadedModel) -> None:
    prompts = ["Hi", "abcabcabcabc", ""]
    texts = generate(loaded, prompts, max_new_tokens=30, temperature=0.5)
    stop = texts[1][7:9]
    rivals = [Request(Sampling(0.5), 30, (stop,), samples=2, ahead=ahead) for ahead in (None, LookUp(6), Draft(loaded, 3))]
    found = [list(complete(loaded, prompts, request)) for request in rivals]
    assert found[0] == found[1] == found[2]
    assert any(done.finished for done in found[0])
    guided = [
        Request(Sampling(), 30, constraint=Choices(("aaaab", "aaaac", "b")), ahead=ahead) for ahead in (None, LookUp(6), Draft(loaded))
    ]
    found = [list(complete(loaded, prompts, request)) for request in guided]
    assert found[0] == found[1] == found[2]


def test_what_cannot_be_guessed_is_refused(loaded: LoadedModel, make_model: Callable[..., Model]) -> None:
    with pytest.raises(UserError, match="leave lookup and draft out"):
        Request(BeamSearch(2), ahead=LookUp(4))
    with pytest.raises(UserError, match="lookup = -1: expected at least 1 token"):
        LookUp(-1)
    with pytest.raises(UserError, match="draft_tokens = 0: expected at least 1"):
        Draft(loaded, 0)

    other = ByteTokenizer()
    other.fingerprint = "other"
    with pytest.raises(UserError, match="draft small: another tokenizer"):
        complete(loaded, ["Hi"], Request(ahead=Draft(dataclasses.replace(loaded, tokenizer=other))))
    short = make_model("gpt2", positions=8)
    with pytest.raises(UserError, match=r"draft short: max_new_tokens = 20: .*8 positions leave 6"):
        complete(loaded, ["Hi"], Request(max_new_tokens=20, ahead=Draft(LoadedModel(short, short.config, ByteTokenizer(), "short"))))
