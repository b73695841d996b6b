"""What fine-tuning learns from examples is the same on every layout, whatever their lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import KEYS, Keys, Learnt, layout
from prepared import STEPS, assert_layout_invisible, engine_of, learn

from teratron.config import UserError
from teratron.data.examples import Example, Examples
from teratron.data.special import SpecialTokens

pytestmark = pytest.mark.xdist_group("ranks")

VOCAB = 40
SEGMENTS = {"similar": 4, "preferred": 2}
BASE: Keys = {**KEYS, "model.seq_length": 32, "model.vocab_size": VOCAB, "data.examples": "made here", "optim.clip": 0.01}
ENCODER: Keys = {**BASE, "model.family": "encoder", "model.token_types": 2, "model.norm_place": "post", "model.embedding_norm": True}
T5: Keys = {**BASE, "model.family": "encoder_decoder", "model.position": "relative", "model.norm": "rmsnorm"}
XLNET: Keys = {**BASE, "model.family": "xlnet", "model.position": "transformer_xl", "model.attention_dropout": 0.3}
LLAMA: Keys = {**BASE, "model.position": "rope", "model.norm": "rmsnorm", "model.activation": "swiglu", "model.kv_heads": 2}
CLASSES: Keys = {"objective.name": "classes", "model.head": "classes", "model.classes": 3, "objective.label_smoothing": 0.1}
POINTING: Keys = {"objective.name": "pointing", "model.head": "classes", "model.classes": 2}
SIMILAR: Keys = {"objective.name": "similar", "model.head": "none"}
ALL: dict[str, Keys] = {
    "classes": {**ENCODER, **CLASSES},
    "classes-pooled": {**ENCODER, **CLASSES, "model.pooler": True},
    "classes-gpt": {**LLAMA, **CLASSES},
    "classes-t5": {**T5, **CLASSES},
    "classes-xlnet": {**XLNET, **CLASSES},
    "pooled": {**ENCODER, **CLASSES, "objective.name": "pooled"},
    "pointing": {**ENCODER, **POINTING},
    "pointing-gpt": {**LLAMA, **POINTING, "model.classes": 1},
    "pointing-xlnet": {**XLNET, **POINTING, "model.classes": 1},
    "similar": {**ENCODER, **SIMILAR},
    "similar-gpt": {**LLAMA, **SIMILAR},
    "preferred": {**LLAMA, "objective.name": "preferred"},
    "supervised": {**LLAMA, "objective.name": "supervised"},
    "supervised-t5": {**T5, "objective.name": "supervised"},
}
WHOLE = ("pooled", "pointing", "similar", "preferred")


def example(keys: Keys, number: int) -> Example:
    """One of any length, of several segments where its objective compares them."""
    draw = np.random.default_rng(number)
    name, family = keys["objective.name"], keys.get("model.family", "gpt")
    segments = 3 if keys.get("model.classes") == 1 else SEGMENTS.get(name, 1)
    lengths = draw.integers(2, 33 // segments, segments)
    fields = _stream(keys, lengths, draw)
    total = int(lengths.sum())
    some = draw.random(total) * (draw.random(total) > 0.4)
    some[-1] = 1.0
    if segments > 1:
        fields |= {"segments": np.repeat(np.arange(len(lengths)), lengths), "positions": np.concatenate([np.arange(n) for n in lengths])}
    if family == "encoder_decoder":
        read = _stream(keys, draw.integers(2, 30, 1), draw)
        fields |= {f"encoder_{field}": values for field, values in read.items()}
    if name == "pointing":
        candidates = draw.random(total) > 0.5
        candidates[0] = True
        for field in ("first_weights", "second_weights"):
            fields[field] = (np.arange(total) == draw.choice(np.flatnonzero(candidates))).astype(float)
        return fields | {"candidates": candidates.astype(int)}
    if name == "similar":
        return fields | {"vector_weights": np.ones(total)}
    classes = keys.get("model.classes", VOCAB)
    fields |= {"targets": draw.integers(0, classes, total), "weights": np.ones(total) if name == "preferred" else some}
    more = {"preferred": {"references": draw.random(total) - 1}, "pooled": {"pool_weights": np.full(total, 1 / total)}}
    return fields | more.get(name, {})


def _stream(keys: Keys, lengths: np.ndarray, draw: np.random.Generator) -> dict[str, np.ndarray]:
    total = int(lengths.sum())
    types = {"token_types": draw.integers(0, 2, total)} if keys.get("model.token_types") else {}
    return {"tokens": draw.integers(0, VOCAB, total), **types}


def train_on_examples(rank: int, ranks: int, keys: dict[str, Any]) -> Learnt:
    """As a run of `teratron finetune` does."""
    engine = engine_of(rank, ranks, keys)
    held = Examples.of([example(keys, number) for number in range((STEPS + 1) * engine.config.train.global_batch)])
    return learn(engine, held, SpecialTokens(VOCAB))


FIRST = [
    (2, "tensor 2 x sequence", "pointing"),
    (2, "pipeline 2", "classes"),
    (4, "tensor 2 x sequence x shard parameters", "similar"),
    (2, "tensor 2 x sequence", "preferred"),
]


@pytest.mark.parametrize(("ranks", "places", "kind"), FIRST)
def test_a_layout_is_the_single_process(ranks: int, places: str, kind: str) -> None:
    assert_layout_invisible(ranks, places, ALL[kind], train=train_on_examples)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("ranks", "places"),
    [
        (2, "tensor 2"),
        (2, "tensor 2 x sequence"),
        (2, "pipeline 2 zb-h1"),
        (4, "pipeline 2 zbv x tensor 2 x sequence"),
        (2, "shard parameters"),
        (4, "tensor 2 x sequence x shard gradients"),
        (2, "context 2 all_to_all"),
        (2, "context 2 ring"),
    ],
)
def test_every_kind_on_every_layout(ranks: int, places: str, kind: str) -> None:
    refused = ("context" in places and (kind.startswith(WHOLE) or kind.endswith("xlnet"))) or ("ring" in places and kind.endswith("t5"))
    if refused:
        with pytest.raises(UserError, match="parallel"):
            train_on_examples(0, 1, {**ALL[kind], **layout(places)})
        return
    assert_layout_invisible(ranks, places, ALL[kind], {"train.micro_batch": 2} if "pipeline" in places else {}, train_on_examples)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_recomputation_and_micro_batches_change_nothing(kind: str) -> None:
    assert_layout_invisible(1, "", ALL[kind], {"train.micro_batch": 2, "train.recompute": "full"}, train_on_examples)
