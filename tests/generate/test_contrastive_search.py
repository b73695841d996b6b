"""Contrastive search equals its definition computed without a cache, alone and in a batch, and is greedy where nothing is left of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from teratron.checkpoint import LoadedModel
from teratron.config import UserError
from teratron.generate import ContrastiveSearch, ContrastiveStream, Decoder, Request, Sampling, TokenStream, complete, generate
from teratron.models import Model, build_model, initialise

PROMPTS = [[72, 105], [256], [84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116], [10, 20, 30]]
NEW = 20


def rows_of(stream: TokenStream, count: int = len(PROMPTS)) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for step in stream:
        for row, token in step:
            rows[row].append(token)
    return rows


def states(model: Model, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Final hidden states [B, S, H], nothing cached."""
    tokens = torch.tensor(sequences)
    with torch.no_grad():
        return model({"tokens": tokens, "positions": torch.arange(tokens.shape[1]).expand(tokens.shape)})["hidden"]


def searched(model: Model, prompt: list[int], count: int, k: int, alpha: float) -> list[int]:
    """The paper's formula, everything computed anew for every candidate of every step."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            likely = model.head.output(states(model, [tokens]))[0, -1].softmax(-1)
        candidates = sorted(range(len(likely)), key=lambda v: -float(likely[v]))[:k]
        hidden = states(model, [[*tokens, v] for v in candidates])
        alike = F.cosine_similarity(hidden[:, -1:], hidden[:, :-1], dim=-1).amax(-1)
        scores = [(1 - alpha) * float(likely[v]) - alpha * float(alike[n]) for n, v in enumerate(candidates)]
        tokens.append(candidates[max(range(k), key=scores.__getitem__)])
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (8, 0.3), (2, 1.0)])
def test_a_batch_equals_the_definition_without_cache(model: Model, k: int, alpha: float) -> None:
    search = ContrastiveSearch(k, alpha)
    expected = [searched(model, prompt, NEW, k, alpha) for prompt in PROMPTS]
    greedy = rows_of(TokenStream(Decoder(model, PROMPTS, NEW), Sampling(temperature=0)))
    assert all(row != likeliest for row, likeliest in zip(expected, greedy, strict=True)), "a search that changes nothing shows nothing"
    assert rows_of(ContrastiveStream(Decoder(model, PROMPTS, NEW), search)) == expected
    assert [rows_of(ContrastiveStream(Decoder(model, [prompt], NEW), search), 1)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.6), (1, 1.0), (5, 0.0), (999, 0.0)])
def test_one_candidate_or_no_penalty_is_greedy(model: Model, k: int, alpha: float) -> None:
    greedy = rows_of(TokenStream(Decoder(model, PROMPTS, NEW), Sampling(temperature=0)))
    assert rows_of(ContrastiveStream(Decoder(model, PROMPTS, NEW), ContrastiveSearch(k, alpha))) == greedy


def test_rows_that_end_leave_the_others_alone(model: Model) -> None:
    full = [searched(model, prompt, NEW, 4, 0.6) for prompt in PROMPTS]
    stop_ids = {full[0][6], full[2][2]}
    expected = [row[: next((n for n, token in enumerate(row) if token in stop_ids), NEW)] for row in full]
    assert len({len(row) for row in expected}) > 1, "rows should end at different steps"
    assert rows_of(ContrastiveStream(Decoder(model, PROMPTS, NEW), ContrastiveSearch(4), stop_ids)) == expected


def test_rows_reach_the_last_position(model: Model) -> None:
    prompts = [[1] * 60, [2, 3]]
    rows = rows_of(ContrastiveStream(Decoder(model, prompts), ContrastiveSearch(4)), 2)
    assert [len(row) for row in rows] == [4, 62]
    assert rows[0] == searched(model, prompts[0], 4, 4, 0.6)


def test_a_cache_that_rolls_with_a_window(model: Model) -> None:
    narrow = build_model(replace(model.config, window=3), dtype=torch.float64)
    initialise(narrow, seed=1)
    expected = [searched(narrow, prompt, NEW, 4, 0.6) for prompt in PROMPTS]
    assert rows_of(ContrastiveStream(Decoder(narrow.eval(), PROMPTS, NEW), ContrastiveSearch(4))) == expected


def test_ids_above_vocab_are_no_candidates(model: Model) -> None:
    assert max(rows_of(ContrastiveStream(Decoder(model, [[1]], 40, vocab=10), ContrastiveSearch(8)), 1)[0]) < 10


def test_text_is_that_of_the_tokens(loaded: LoadedModel) -> None:
    (done,) = complete(loaded, ["Hi"], Request(ContrastiveSearch(4), NEW))
    assert done.tokens == searched(loaded.model, [72, 105], NEW, 4, 0.6)
    assert generate(loaded, "Hi", contrastive_k=4, max_new_tokens=NEW) == done.text
    assert generate(loaded, "Hi", contrastive_k=8, contrastive_alpha=0.3, max_new_tokens=NEW) != done.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrastive_k": 4, "top_k": 5}, "top_k = 5 with contrastive_k = 4"),
        ({"contrastive_k": 4, "top_p": 0.9}, "top_p = 0.9 with contrastive_k = 4"),
        ({"contrastive_k": 4, "temperature": 0.0}, "temperature = 0.0 with contrastive_k = 4"),
        ({"contrastive_alpha": 0.5}, "contrastive_alpha = 0.5 needs contrastive_k"),
        ({"contrastive_k": -1}, "contrastive_k = -1: expected at least 1"),
        ({"contrastive_k": 4, "contrastive_alpha": 1.5}, "contrastive_alpha = 1.5: expected a number from 0 to 1"),
    ],
)
def test_options_that_contradict_are_refused(loaded: LoadedModel, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(loaded, "Hi", **options)


def test_several_samples_are_refused() -> None:
    with pytest.raises(UserError, match="samples = 2: contrastive search draws nothing"):
        Request(ContrastiveSearch(4), samples=2)
