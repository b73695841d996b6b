"""Texts have the same likelihoods in a training job on every layout as in the whole model by itself."""

from __future__ import annotations

import pytest
from cases import VOCAB, Keys, engine_of, layout
from pool import pool

from teratron.checkpoint import LoadedModel
from teratron.data.tokenizer import CharTokenizer
from teratron.tasks.evaluate.likelihood import Likelihood, ModelScorer, Request
from teratron.tasks.evaluate.training import EngineScorer

pytestmark = pytest.mark.xdist_group("ranks")
MOE: Keys = {"model.experts": 4, "model.bias": False, "model.activation": "swiglu"}
T5: Keys = {"model.family": "encoder_decoder", "model.position": "relative", "train.micro_batch": 2}
FIRST = [
    (2, {"train.micro_batch": 2}, "tensor 2 x sequence"),
    (4, {"train.micro_batch": 4}, "pipeline 2 x context 2"),
    (2, {}, "shard parameters"),
    (4, T5, "pipeline 2 x tensor 2"),
]
FURTHER = [
    (2, {}, "tensor 2"),
    (2, {"model.tie_embeddings": False}, "replicate 2"),
    (4, MOE, "expert 2 x shard parameters"),
    (4, {"model.position": "rope"}, "context 2 all_to_all x tensor 2 x sequence"),
    (4, {"train.micro_batch": 1}, "pipeline 2 interleaved x shard optimizer"),
    (4, {"train.micro_batch": 2}, "pipeline 2 zbv x tensor 2 x sequence"),
    (4, T5, "tensor 2 x sequence x shard gradients"),
    (8, T5, "pipeline 2 x context 2 all_to_all x tensor 2 x sequence"),
]


class Framed(CharTokenizer):
    """Ten letters, and what stands around the texts of an encoder-decoder."""

    def __init__(self) -> None:
        super().__init__("abcdefghij!")

    def token_id(self, token: str) -> int | None:
        return {"<pad>": 11, "</s>": 12}.get(token, super().token_id(token))


LENGTHS = [(1, 1), (3, 2), (7, 1), (12, 3), (2, 6), (1, 8), (5, 2)]
REQUESTS = [
    Request([(n + 3 * i) % VOCAB for i in range(read)], [(5 * n + i) % VOCAB for i in range(end)]) for n, (read, end) in enumerate(LENGTHS)
]


def scored(rank: int, ranks: int, keys: Keys) -> list[tuple[float, bool]]:
    found = EngineScorer(engine_of(rank, ranks, keys), Framed()).likelihoods([*REQUESTS, *_guessed(keys)])
    return [(one.total, one.greedy) for one in found]


def _guessed(keys: Keys) -> list[Request]:
    """What the model itself would write, of one token."""
    return [Request(request.context, one.guess[:1]) for request, one in zip(REQUESTS, alone(keys, REQUESTS), strict=True)]


def alone(keys: Keys, requests: list[Request]) -> list[Likelihood]:
    """By the whole model, without an engine's forward pass."""
    plain = {name: value for name, value in keys.items() if not name.startswith("parallel.")}
    model = engine_of(0, 1, plain).model.eval()
    return ModelScorer(LoadedModel(model, model.config, Framed(), "alone", "next_token"), 1).likelihoods(requests)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "keys", "name"), [*FIRST, *(pytest.param(*row, marks=pytest.mark.slow) for row in FURTHER)])
def test_layout_is_invisible(ranks: int, keys: Keys, name: str) -> None:
    expected = alone(keys, [*REQUESTS, *_guessed(keys)])
    assert {one.greedy for one in expected} == {True, False}
    for found in pool().run(scored, ranks, keys | layout(name)):
        for (total, greedy), wanted in zip(found, expected, strict=True):
            assert total == pytest.approx(wanted.total, rel=1e-9)
            assert greedy == wanted.greedy
