"""Prompts are read as the objective had them in training, from both sides where it was so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from teratron.checkpoint import LoadedModel
from teratron.config import ModelConfig, UserError
from teratron.data.bpe import train_bpe
from teratron.data.tokenizer import ByteTokenizer, Tokenizer
from teratron.generate import BeamSearch, Decoder, Request, Sampling, TokenStream, complete
from teratron.generate.frame import frame_of
from teratron.models import Model, build_model, initialise

ROLES = ("[PAD]", "[SEP]", "[MASK]", "[R]", "[S]", "[X]", "<extra_id_0>", "<extra_id_1>")
PROMPTS = [[72, 105], [84, 104, 101, 32, 99, 97, 116], [10, 20, 30]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a few words of a text"], 280, ROLES)


def seen_from_both_sides(model: Model, prompt: list[int], count: int) -> list[int]:
    """Greedy, everything computed anew for every token, the prompt a prefix."""
    tokens = list(prompt)
    for _ in range(count):
        places = torch.arange(len(tokens))[None]
        with torch.no_grad():
            hidden = model({"tokens": torch.tensor([tokens]), "positions": places, "prefix": places < len(prompt)})["hidden"]
            tokens.append(int(model.head.output(hidden)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "keys", [{}, {"window": 5, "global_tokens": 1}, {"position": "relative"}, {"position": "alibi"}, {"latent": 8, "rope_dim": 8}], ids=str
)
def test_a_prompt_that_all_of_it_sees(make_model: Callable[..., Model], keys: dict[str, object]) -> None:
    model = make_model("llama", **({"kv_heads": 4, "qk_norm": False} if "latent" in keys else {}) | keys)
    rows: dict[bool, list[list[int]]] = {True: [[], [], []], False: [[], [], []]}
    for both_sides, found in rows.items():
        for row, token in itertools.chain.from_iterable(TokenStream(Decoder(model, PROMPTS, 12, both_sides=both_sides), Sampling(0))):
            found[row].append(token)
    assert rows[True] == [seen_from_both_sides(model, prompt, 12) for prompt in PROMPTS]
    assert rows[True] != rows[False], "what is seen should matter"


def test_a_run_of_prefix_language_modelling_sees_its_prompts_so(loaded: LoadedModel) -> None:
    run = replace(loaded, objective="prefix")
    for how in (Sampling(0), BeamSearch(1)):
        done = list(complete(run, PROMPTS, Request(how, 12)))
        assert [one.tokens for one in done] == [seen_from_both_sides(loaded.model, prompt, 12) for prompt in PROMPTS]


def test_what_stands_around_a_prompt(tokenizer: Tokenizer) -> None:
    ids = {role: tokenizer.token_id(role) for role in ROLES}
    text = tokenizer.encode("a few")
    plain = frame_of("gpt", "next_token", tokenizer)
    assert (plain.read("a few"), plain.both_sides, plain.start) == (text, False, None)
    spans = frame_of("gpt", "span_corruption", tokenizer)
    assert (spans.read("a few"), spans.both_sides, spans.start) == ([*text, ids["[SEP]"]], True, None)
    assert ids["[SEP]"] in spans.ends
    answers = frame_of("encoder_decoder", None, tokenizer)
    assert (answers.read("a few"), answers.both_sides, answers.start) == ([*text, ids["[SEP]"]], False, ids["[PAD]"])
    for family in ("gpt", "encoder_decoder"):
        mixed = frame_of(family, "ul2", tokenizer)
        assert mixed.read("a few") == [ids["[S]"], *text, ids["[SEP]"]], "going on is what a plain prompt asks for"
        assert mixed.read("[X]a few") == [ids["[X]"], *text, ids["[SEP]"]]
        assert mixed.read("a few<extra_id_0>") == [ids["[R]"], *text, ids["<extra_id_0>"], ids["[SEP]"]]


def test_sentinels_are_text_where_none_were_learnt(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_id("<extra_id_0>") not in frame_of("gpt", "next_token", tokenizer).read("a<extra_id_0>")


def test_what_is_written_behind_a_frame_is_a_text_of_its_own(tokenizer: Tokenizer) -> None:
    config = ModelConfig(layers=1, hidden=16, heads=2, seq_length=32, vocab_size=tokenizer.vocab_size, init_std=0.4)
    model = build_model(config, dtype=torch.float64)
    initialise(model, 1)
    run = LoadedModel(model.eval(), config, tokenizer, "small", "ul2")
    (done,) = complete(run, ["a few"], Request(Sampling(0), 8))
    assert done.text == tokenizer.decode(done.tokens)
    assert done.tokens == seen_from_both_sides(model, frame_of("gpt", "ul2", tokenizer).read("a few"), 8)[: len(done.tokens)]


def test_a_tokenizer_without_the_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="this bytes tokenizer has no end of a text: give the one that the model was trained with"):
        frame_of("gpt", "span_corruption", ByteTokenizer())
