"""The engine: cached decoding equals recomputation, a batch equals single calls, and rows end where they should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from teratron.config import UserError
from teratron.generate import Decoder, Sampling, TokenStream
from teratron.generate.cache import KVCache
from teratron.generate.decoder import room_for
from teratron.generate.sampler import choose, uniform
from teratron.models import Model
from teratron.models.sight import Sight

GREEDY = Sampling(temperature=0)
PROMPTS = [[72, 105], [256], [84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116], [10, 20, 30]]


def all_logits(model: Model, tokens: list[int]) -> Tensor:
    """Logits [S, V] without a cache."""
    state = {"tokens": torch.tensor([tokens]), "positions": torch.arange(len(tokens))[None]}
    with torch.no_grad():
        return model.head.output(model(state)["hidden"])[0]


def recomputed(model: Model, prompt: list[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    """The continuation by a full forward pass for each token: the plain meaning of generation."""
    tokens = list(prompt)
    for place in range(count):
        tokens += choose(all_logits(model, tokens)[-1:], sampling, [uniform(sampling.seed, place)]).tolist()
    return tokens[len(prompt) :]


def rows_of(stream: TokenStream, count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for step in stream:
        for row, token in step:
            rows[row].append(token)
    return rows


def test_cached_logits_equal_full_logits(model: Model) -> None:
    tokens = [5, 200, 17, 99, 3, 250, 42, 8]
    cache = KVCache(len(tokens))
    pieces = []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 8)):
            places = torch.arange(start, stop)[None]
            state = {"tokens": torch.tensor([tokens[start:stop]]), "positions": places, "order": places}
            pieces.append(model.head.output(model(state, cache=cache)["hidden"])[0])
    expected = all_logits(model, tokens)
    assert expected.std() > 0.5, "a model that says nothing could hide a difference"
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=1e-10)


def test_full_cache_refuses_more(model: Model) -> None:
    cache = KVCache(2)
    new = torch.zeros(1, model.config.key_value_heads, 3, model.config.head_features, dtype=torch.float64)
    with pytest.raises(IndexError, match="2 columns cannot hold 3"):
        cache.append(0, new, new, Sight(True))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=7), Sampling(0.7, top_k=20, top_p=0.9, seed=3)], ids=str)
def test_batch_of_different_lengths_equals_recomputation_alone(model: Model, sampling: Sampling) -> None:
    expected = [recomputed(model, prompt, 20, sampling) for prompt in PROMPTS]
    assert rows_of(TokenStream(Decoder(model, PROMPTS, 20), sampling), len(PROMPTS)) == expected
    assert [rows_of(TokenStream(Decoder(model, [prompt], 20), sampling), 1)[0] for prompt in PROMPTS] == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS), "rows that all agree could hide a mix-up"


WINDOWS = {
    "window": {"window": 6},
    "dilated, with sinks": {"window": 7, "dilation": 2, "global_tokens": 2},
    "strided": {"window": 5, "pattern": "strided", "global_tokens": 1},
    "fixed": {"window": 5, "pattern": "fixed", "summary": 2},
    "every second layer": {"window": 4, "global_tokens": 3, "global_every": 2},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_a_batch_equal_recomputation_alone(make_model: Callable[..., Model], name: str) -> None:
    model, prompts = make_model("llama", **WINDOWS[name]), [PROMPTS[0], PROMPTS[2] * 2]
    expected = [recomputed(model, prompt, 20) for prompt in prompts]
    assert rows_of(TokenStream(Decoder(model, prompts, 20), GREEDY), len(prompts)) == expected
    assert rows_of(TokenStream(Decoder(model, prompts[1:], 20), GREEDY), 1)[0] == expected[1]
    assert expected[1] != recomputed(make_model("llama"), prompts[1], 20), "what a window hides should matter"


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_a_window_bounds_the_cache_and_tokens_may_come_in_any_number(make_model: Callable[..., Model], chunk: int) -> None:
    model = make_model("llama", window=5, global_tokens=2, global_every=2)
    tokens = torch.randint(257, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    cache, pieces = KVCache(len(tokens)), []
    for start in range(0, len(tokens), chunk):
        places = torch.arange(start, min(start + chunk, len(tokens)))[None]
        state = {"tokens": torch.tensor([tokens[start : start + chunk]]), "positions": places, "order": places}
        with torch.no_grad():
            pieces.append(model.head.output(model(state, cache=cache)["hidden"])[0])
    torch.testing.assert_close(torch.cat(pieces), all_logits(model, tokens), rtol=0, atol=1e-10)
    local, everywhere = (cache.layers[layer][0] for layer in (0, 1))
    assert local.shape[2] <= 2 * (5 + 2) < everywhere.shape[2] == 60


def test_rows_that_end_leave_the_others_alone(model: Model) -> None:
    full = [recomputed(model, prompt, 20) for prompt in PROMPTS]
    stop_ids = {full[0][6], full[2][2]}
    expected = [row[: next((n for n, token in enumerate(row) if token in stop_ids), 20)] for row in full]
    assert len({len(row) for row in expected}) > 1, "rows should end at different steps"
    assert rows_of(TokenStream(Decoder(model, PROMPTS, 20), GREEDY, stop_ids), len(PROMPTS)) == expected


def test_reader_stops_a_row(model: Model) -> None:
    full = [recomputed(model, prompt, 12) for prompt in PROMPTS]
    stream = TokenStream(Decoder(model, PROMPTS, 12), GREEDY)
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for number, step in enumerate(stream):
        for row, token in step:
            rows[row].append(token)
        if number == 4:
            stream.stop(1)
    assert rows == [full[0], full[1][:5], full[2], full[3]]


def test_rows_reach_the_last_position_together_with_shorter_ones(model: Model) -> None:
    prompts = [[1] * 60, [2, 3]]
    rows = rows_of(TokenStream(Decoder(model, prompts), GREEDY), 2)
    assert [len(row) for row in rows] == [4, 62], "without a number each row goes as far as its positions reach"
    assert rows == [recomputed(model, prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True)]


def test_real_tokens_see_the_real_ones_before_and_no_position_sees_nothing() -> None:
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    places = torch.tensor([[-2, -1, 0, 1], [0, 1, 2, 3]])
    mask = Sight(True, order=places, key_order=places).mask(4, 4, places.device)[:, 0]
    for row in range(2):
        for query in range(4):
            seen = [key for key in range(query + 1) if real[row, key] or not real[row, query]]
            assert mask[row, query].nonzero()[:, 0].tolist() == seen, "a softmax over nothing is NaN in some kernels"


def test_seed_of_a_row_gives_the_same_in_any_place(model: Model) -> None:
    seeds = [11, 12, 13]
    together = rows_of(TokenStream(Decoder(model, [PROMPTS[0]] * 3, 15), Sampling(), seeds=seeds), 3)
    reverse = rows_of(TokenStream(Decoder(model, [PROMPTS[0]] * 3, 15), Sampling(), seeds=seeds[::-1]), 3)
    assert together == reverse[::-1]
    assert len({tuple(row) for row in together}) == 3


def test_ids_above_vocab_are_never_chosen(model: Model) -> None:
    assert max(rows_of(TokenStream(Decoder(model, [[1]], 40), Sampling(temperature=5)), 1)[0]) >= 10
    assert max(rows_of(TokenStream(Decoder(model, [[1]], 40, vocab=10), Sampling(temperature=5)), 1)[0]) < 10


def test_no_prompts_give_nothing(model: Model) -> None:
    assert list(TokenStream(Decoder(model, [], 5), GREEDY)) == []


@pytest.mark.parametrize(
    ("length", "new", "message"),
    [
        (64, 1, "prompt has 64 tokens and the model 64 positions: shorten it to at most 63"),
        (60, 5, r"max_new_tokens = 5: after the prompt's 60 tokens the model's 64 positions leave 4; ask for at most 4"),
        (1, 0, "max_new_tokens = 0: expected at least 1"),
        (0, 5, "the prompt has no tokens"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(make_model: Callable[..., Model], length: int, new: int, message: str) -> None:
    config = make_model("gpt2").config
    with pytest.raises(UserError, match=message):
        room_for([1] * length, config, new)
    assert room_for([1] * 60, config, 4) == 4


BEYOND = {
    "rope": {},
    "rope, window": {"window": 5, "global_tokens": 1},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "sinusoidal": {"position": "sinusoidal"},
    "none": {"position": "none"},
}


@pytest.mark.parametrize("name", BEYOND)
def test_positions_that_are_computed_go_on_beyond_those_of_training(make_model: Callable[..., Model], name: str) -> None:
    model, prompts = make_model("llama", positions=8, **BEYOND[name]), [PROMPTS[0], PROMPTS[2]]
    expected = [recomputed(model, prompt, 20) for prompt in prompts]
    assert rows_of(TokenStream(Decoder(model, prompts, 20), GREEDY), 2) == expected
    assert room_for([1] * 6, model.config, None) == 2, "not unless it is asked for"
    with pytest.raises(UserError, match="8 positions: shorten it to at most 7 tokens, or say with max_new_tokens how far to go"):
        room_for([1] * 8, model.config, None)


def test_foreign_ids_are_refused(model: Model) -> None:
    with pytest.raises(UserError, match="token 257, but the model's ids are 0 to 256"):
        Decoder(model, [[1], [3, 257]], 5)
