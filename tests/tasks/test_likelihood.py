"""A text's likelihood is the sum of its tokens' log-probabilities in one whole forward pass, in any batch and any family."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from scored import log_probabilities, random_model

from teratron.config import UserError
from teratron.tasks.evaluate.likelihood import ModelScorer, Request, rolling

TEXTS = [("the cat", " sat"), ("a", " long continuation"), ("", "no context"), ("some words before it ", "x"), ("two\n\n", "b c")]
ROPE = {"position": "rope", "kv_heads": 2, "tie_embeddings": False, "bias": False, "activation": "swiglu"}
MOE = {"experts": 4, "experts_per_token": 2, "capacity": 1.0}
FAMILIES: dict[str, dict[str, Any]] = {"gpt": {}, "rope": ROPE, "experts": MOE, "window": {"window": 8}}
families = pytest.mark.parametrize("keys", FAMILIES.values(), ids=FAMILIES)


@families
def test_a_decoders_likelihood_is_that_of_its_forward_pass(keys: dict[str, Any]) -> None:
    if "experts" in keys:
        keys = {**keys, "capacity": 0.0}  # a forward pass by itself drops tokens
    loaded = random_model(**keys)
    for (context, text), found in zip(TEXTS, scored(random_model(**keys), batch=2), strict=True):
        tokens = list((context + text).encode()) if context else [256, *text.encode()]
        count = len(tokens) - len(context.rstrip().encode() if context else [256])
        assert found.total == pytest.approx(float(log_probabilities(loaded, tokens)[-count:].sum()), rel=1e-12)


def scored(loaded: Any, batch: int) -> list[Any]:
    scorer = ModelScorer(loaded, batch)
    return scorer.likelihoods([scorer.pair(*pair) for pair in TEXTS])


@families
def test_the_batch_does_not_show(keys: dict[str, Any]) -> None:
    alone = scored(random_model(**keys), 1)
    for batch in (2, 5):
        for a, b in zip(scored(random_model(**keys), batch), alone, strict=True):
            assert a.total == pytest.approx(b.total, rel=1e-12)
            assert a.guess == b.guess


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("position", ["relative", "learned"])
def test_an_encoder_decoder_scores_what_it_writes(position: str, batch: int) -> None:
    loaded = random_model("span_corruption", family="encoder_decoder", position=position)
    for (context, text), found in zip(TEXTS, scored(loaded, batch), strict=True):
        read = torch.tensor([[*context.encode(), 258]])
        memory = {"encoder_tokens": read, "encoder_positions": torch.arange(read.shape[1])[None]}
        wanted = log_probabilities(loaded, [257, *text.encode()], **memory).sum()
        assert found.total == pytest.approx(float(wanted), rel=1e-12)


def test_a_prefix_model_reads_the_context_from_both_sides() -> None:
    loaded = random_model("prefix")
    found = ModelScorer(loaded, 3)
    for (context, text), one in zip(TEXTS[:2], found.likelihoods([found.pair(*pair) for pair in TEXTS[:2]]), strict=True):
        tokens = list((context + text).encode())
        prefix = (torch.arange(len(tokens) - 1) < len(context))[None]
        wanted = log_probabilities(loaded, tokens, prefix=prefix)[len(context) - 1 :].sum()
        assert one.total == pytest.approx(float(wanted), rel=1e-12)


def test_the_guess_is_what_the_model_would_write() -> None:
    loaded = random_model()
    scorer = ModelScorer(loaded)
    first = scorer.likelihoods([scorer.pair("the cat", "?")])[0].guess[0]
    request = dataclasses.replace(scorer.pair("the cat", "?"), continuation=[first])
    assert scorer.likelihoods([request])[0].greedy
    other = dataclasses.replace(request, continuation=[first + 1 if first < 200 else first - 1])
    assert not scorer.likelihoods([other])[0].greedy


def test_a_long_context_loses_its_beginning() -> None:
    scorer = ModelScorer(random_model(seq_length=16))
    long, short = Request(list(range(60)), [7, 8, 9]), Request(list(range(46, 60)), [7, 8, 9])
    a, b = scorer.likelihoods([long, short])
    assert a.total == pytest.approx(b.total, rel=1e-12)
    assert scorer.count_cut([long, short]) == 1


@pytest.mark.parametrize(("count", "length", "stride"), [(40, 8, 8), (40, 8, 3), (41, 8, 1), (5, 8, 4), (8, 8, 2), (9, 8, 4)])
def test_windows_score_every_token_once(count: int, length: int, stride: int) -> None:
    tokens = list(range(1, count + 1))
    windows = list(rolling(tokens, 0, length, stride))
    assert [token for window in windows for token in window.continuation] == tokens
    for place, window in enumerate(windows):
        first = window.continuation[0]
        assert len(window.context) + len(window.continuation) <= length + 1
        assert list(window.context) == list(range(first - len(window.context), first))  # the tokens just before it
        assert place == 0 or len(window.context) >= length - stride + 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "no tokens"),
        (Request([1], []), "no tokens"),
        (Request([1], [2] * 33), "33 tokens and the model 32 positions"),
        (Request([1], [259]), "gives token 259, but random has ids 0 to 258"),
    ],
)
def test_what_cannot_be_scored_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelScorer(random_model()).likelihoods([Request([1], [2]), request_])


def test_a_model_that_sees_both_sides_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.family = encoder gives a text no probability"):
        ModelScorer(random_model("masked", family="encoder"))


def test_a_model_of_another_head_is_refused() -> None:
    loaded = random_model()
    config = dataclasses.replace(loaded.config, head="classes", classes=2)
    with pytest.raises(UserError, match=r"model\.head = classes: was fine-tuned for another task"):
        ModelScorer(dataclasses.replace(loaded, config=config))
