"""An encoder-decoder's answers are what its whole forward pass gives token by token, alone and in any batch, and end where they should."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from teratron.config import ModelConfig, UserError
from teratron.generate import AnswerDecoder, TokenStream
from teratron.generate.contrastive import ContrastiveSearch
from teratron.generate.sampler import Sampling
from teratron.models import EncoderDecoder, build_model, initialise

VOCAB, START = 29, 1
T5 = ModelConfig(
    family="encoder_decoder", layers=2, hidden=32, heads=4, kv_heads=2, seq_length=16, vocab_size=VOCAB, vocab_multiple=8, init_std=0.4,
    norm="rmsnorm", activation="geglu_tanh", position="relative", relative_buckets=8, relative_distance=10, bias=False,
    tie_embeddings=False, scale_attention=False,
)  # fmt: skip
BART = dataclasses.replace(T5, norm="layernorm", activation="gelu", position="learned", norm_place="post", position_offset=2, bias=True)
BART = dataclasses.replace(BART, tie_embeddings=True, scale_attention=True, embedding_norm=True)
STYLES = pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]


def made(config: ModelConfig) -> EncoderDecoder:
    model = build_model(config, dtype=torch.float64)
    initialise(model, 3)
    assert isinstance(model, EncoderDecoder)
    return model.eval()


def answers(
    model: EncoderDecoder, prompts: list[list[int]], limit: int = 9, stop: set[int] | None = None, heat: float = 0
) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    seeds = [prompt[0] for prompt in prompts]
    for step in TokenStream(AnswerDecoder(model, prompts, START, limit), Sampling(temperature=heat), stop or set(), seeds):
        for row, token in step:
            rows[row].append(token)
    return rows


def greedy(model: EncoderDecoder, prompt: list[int], limit: int) -> list[int]:
    """By whole forward passes, without any memory of the one before."""
    written = [START]
    for _ in range(limit):
        state = {"tokens": torch.tensor([written]), "encoder_tokens": torch.tensor([prompt])}
        state |= {"positions": torch.arange(len(written))[None], "encoder_positions": torch.arange(len(prompt))[None]}
        with torch.no_grad():
            written.append(int(model.head.output(model(state)["hidden"])[0, -1].argmax()))
    return written[1:]


@STYLES
def test_greedy_answers_are_those_of_whole_forward_passes(config: ModelConfig) -> None:
    model = made(config)
    expected = [greedy(model, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 1, "the prompts matter"
    assert answers(model, PROMPTS) == expected


@STYLES
def test_an_answer_is_the_same_alone_and_when_others_have_ended(config: ModelConfig) -> None:
    model = made(config)
    together = answers(model, PROMPTS, heat=1.0)
    assert together == [answers(model, [prompt], heat=1.0)[0] for prompt in PROMPTS]
    stop = {together[1][2]}
    ended = answers(model, PROMPTS, stop=stop, heat=1.0)
    for answer, whole in zip(ended, together, strict=True):
        cut = next((place for place, token in enumerate(whole) if token in stop), len(whole))
        assert answer == whole[:cut]


def test_the_decoder_has_all_positions_whatever_is_read() -> None:
    model = made(BART)
    long = [list(range(2, 17))]
    assert len(answers(model, long, limit=16)[0]) == 16
    assert len(answers(model, [list(range(2, 18))])[0]) == 9
    with pytest.raises(UserError, match="the prompt has 17 tokens"):
        answers(model, [list(range(2, 19))])
    with pytest.raises(UserError, match="ask for at most 16"):
        answers(model, long, limit=17)


def test_contrastive_search_is_refused(tmp_path) -> None:
    from teratron.checkpoint import LoadedModel
    from teratron.data.bpe import train_bpe
    from teratron.generate import Generator, Request

    tokenizer = train_bpe(["a few words"], 270, ("[PAD]", "[SEP]"))
    loaded = LoadedModel(made(dataclasses.replace(T5, vocab_size=270)), T5, tokenizer, "here")
    with pytest.raises(UserError, match="an encoder-decoder has no contrastive search: leave it out"):
        Generator(loaded, Request(ContrastiveSearch(4)))
    loaded = dataclasses.replace(loaded, tokenizer=train_bpe(["a few words"], 270))
    with pytest.raises(UserError, match="has no padding token, with which a decoder begins"):
        Generator(loaded, Request())
