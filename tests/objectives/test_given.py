"""Objectives of fine-tuning equal plain formulas, and do not change with padding or with what else is in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import Config, UserError
from teratron.data.examples import Examples
from teratron.data.special import SpecialTokens
from teratron.models import build_model, initialise
from teratron.objectives import Batch, build_objective, total_loss

VOCAB, LENGTH = 40, 24


def config(objective: str, family: str = "encoder", **keys: Any) -> Config:
    head = {"classes": "classes", "pooled": "classes", "pointing": "classes", "similar": "none"}.get(objective, "language")
    values = {"model.layers": 1, "model.hidden": 16, "model.heads": 2, "model.seq_length": LENGTH, "model.vocab_size": VOCAB}
    values |= {"model.family": family, "model.head": head, "objective.name": objective, "data.examples": "x", "model.init_std": 0.2}
    return Config().override(values | {name.replace("__", "."): value for name, value in keys.items()})


def made(settings: Config) -> torch.nn.Module:
    model = build_model(settings.model, dtype=torch.float64)
    initialise(model, 1)
    return model


def batch_of(settings: Config, examples: list[dict[str, np.ndarray]]) -> Batch:
    held = Examples.of(examples)
    return build_objective(settings).prepare(held, np.arange(len(examples)), SpecialTokens(VOCAB))


def loss_of(settings: Config, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    objective = build_objective(settings)
    counts = objective.counts(batch)
    terms = objective.terms(model, model(objective.inputs(batch)), batch)
    return total_loss(terms, counts), {term.name: float(term.sum.detach() / counts[term.name]) for term in terms}


def texts(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCAB, length) for length in lengths]


@pytest.mark.parametrize("family", ["encoder", "gpt"])
def test_classes_are_a_weighted_cross_entropy_untouched_by_padding(family: str) -> None:
    settings = config("classes", family, model__classes=3)
    model, found, weights, labels = made(settings), texts([3, 9, 6]), [1.0, 0.5, 2.0], [0, 2, 1]
    place = [0 if family == "encoder" else len(text) - 1 for text in found]
    examples = [
        {"tokens": text, "targets": np.full(len(text), label), "weights": (np.arange(len(text)) == at) * weight}
        for text, label, weight, at in zip(found, labels, weights, place, strict=True)
    ]
    loss, told = loss_of(settings, model, batch_of(settings, examples))
    plain, right = torch.zeros((), dtype=torch.float64), 0.0
    for text, label, weight, at in zip(found, labels, weights, place, strict=True):
        tokens = torch.from_numpy(text)[None]
        scores = model.head.scores(model({"tokens": tokens, "positions": torch.arange(len(text))[None]}))[0, at]
        plain += weight * F.cross_entropy(scores, torch.tensor(label))
        right += weight * (int(scores.argmax()) == label)
    torch.testing.assert_close(loss, plain / sum(weights), rtol=1e-12, atol=1e-12)
    assert told["accuracy"] == pytest.approx(right / sum(weights))


def test_pooled_reads_the_mean_of_the_tokens() -> None:
    settings = config("pooled", model__classes=3)
    model, found, weights, labels = made(settings), texts([3, 9, 6]), [1.0, 0.5, 2.0], [0, 2, 1]
    examples = [
        {
            "tokens": text,
            "targets": (np.arange(len(text)) == 0) * label,
            "weights": (np.arange(len(text)) == 0) * weight,
            "pool_weights": np.full(len(text), 1 / len(text)),
        }
        for text, label, weight in zip(found, labels, weights, strict=True)
    ]
    loss, _ = loss_of(settings, model, batch_of(settings, examples))
    plain = torch.zeros((), dtype=torch.float64)
    for text, label, weight in zip(found, labels, weights, strict=True):
        state = model({"tokens": torch.from_numpy(text)[None], "positions": torch.arange(len(text))[None]})
        plain += weight * F.cross_entropy(model.head.classes(state["hidden"][0].mean(0)), torch.tensor(label))
    torch.testing.assert_close(loss, plain / sum(weights), rtol=1e-6, atol=1e-7)  # weights such as 1 / 3 are stored in float32


def test_pointing_is_a_cross_entropy_over_the_candidates() -> None:
    settings = config("pointing", model__classes=2)
    model, found = made(settings), texts([5, 8])
    spans, allowed = [(1, 2), (0, 7)], [np.array([1, 1, 1, 0, 1]), np.ones(8)]
    examples = [
        {
            "tokens": text,
            "candidates": candidates.astype(np.int64),
            "first_weights": (np.arange(len(text)) == first).astype(np.float32),
            "second_weights": (np.arange(len(text)) == second).astype(np.float32),
        }
        for text, candidates, (first, second) in zip(found, allowed, spans, strict=True)
    ]
    loss, told = loss_of(settings, model, batch_of(settings, examples))
    plain, right = [], []
    for text, candidates, span in zip(found, allowed, spans, strict=True):
        scores = model.head.scores(model({"tokens": torch.from_numpy(text)[None], "positions": torch.arange(len(text))[None]}))[0]
        kept = scores.masked_fill(torch.from_numpy(candidates)[:, None] == 0, -torch.inf)
        plain += [F.cross_entropy(kept[:, kind], torch.tensor(place)) for kind, place in enumerate(span)]
        right.append(all(int(kept[:, kind].argmax()) == place for kind, place in enumerate(span)))
    torch.testing.assert_close(loss, torch.stack(plain).mean(), rtol=1e-12, atol=1e-12)
    assert told["accuracy"] == pytest.approx(np.mean(right))


def packed(group: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Texts as segments of one example."""
    lengths = [len(text) for text in group]
    return {
        "tokens": np.concatenate(group),
        "positions": np.concatenate([np.arange(length) for length in lengths]),
        "segments": np.repeat(np.arange(len(group)), lengths),
        "vector_weights": np.concatenate([np.full(length, 1 / length, np.float32) for length in lengths]),
    }


@pytest.mark.parametrize("family", ["encoder", "gpt"])
def test_similar_finds_each_pair_among_those_of_its_example_alone(family: str) -> None:
    settings = config("similar", family, objective__temperature=0.3)
    model, groups = made(settings), [texts([3, 4, 2, 5], 1), texts([6, 2], 2)]
    loss, _ = loss_of(settings, model, batch_of(settings, [packed(group) for group in groups]))
    plain = []
    for group in groups:
        states = [model({"tokens": torch.from_numpy(t)[None], "positions": torch.arange(len(t))[None]})["hidden"][0] for t in group]
        vectors = F.normalize(torch.stack([state.mean(0) for state in states]), dim=-1)
        cosines = vectors[::2] @ vectors[1::2].T / 0.3
        own = torch.arange(len(cosines))
        plain += [(F.cross_entropy(cosines, own, reduction="none") + F.cross_entropy(cosines.T, own, reduction="none")) / 2]
    # weights such as 1 / 3 are stored in float32
    torch.testing.assert_close(loss, torch.cat(plain).mean(), rtol=1e-6, atol=1e-7)


def test_preferred_has_the_loss_and_the_gradient_of_the_formula() -> None:
    settings = config("preferred", "gpt", objective__beta=0.4)
    model = made(settings)
    pairs, references = [(texts([7, 5], 3), (2, 3)), (texts([4, 9], 4), (1, 4))], [(-3.0, -2.5), (-4.0, -7.0)]
    examples, plain = [], []
    for (group, begins), reference in zip(pairs, references, strict=True):
        example = packed(group)
        lengths = [len(text) for text in group]
        example["targets"] = np.concatenate([np.append(text[1:], 0) for text in group])
        marks = [np.arange(n) for n in lengths]
        example["weights"] = np.concatenate([(p >= b - 1) & (p < n - 1) for p, b, n in zip(marks, begins, lengths, strict=True)]).astype(
            np.float32
        )
        example["references"] = np.concatenate([(p == b) * r for p, b, r in zip(marks, begins, reference, strict=True)]).astype(np.float32)
        del example["vector_weights"]
        examples.append(example)
        margin = torch.zeros((), dtype=torch.float64)
        for text, begin, sign, known in zip(group, begins, (1, -1), reference, strict=True):
            state = model({"tokens": torch.from_numpy(text)[None], "positions": torch.arange(len(text))[None]})
            scores = model.head.output(state["hidden"])[0].log_softmax(-1)
            chosen = scores[torch.arange(begin - 1, len(text) - 1), torch.from_numpy(text[begin:])].sum()
            margin = margin + sign * 0.4 * (chosen - known)
        plain.append(-F.logsigmoid(margin))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss, told = loss_of(settings, model, batch_of(settings, examples))
    expected = torch.stack(plain).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert told["accuracy"] == pytest.approx(np.mean([float(term) < np.log(2) for term in plain]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objective.name": "classes"}, "objective.name = classes reads data.examples: use `teratron finetune`"),
        ({"data.examples": "x"}, "objective.name = next_token reads text, not data.examples"),
        ({"objective.name": "classes", "data.examples": "x"}, "set --model.head classes"),
        ({"model.head": "classes"}, "model.classes = 0 with model.head = classes: set --model.head classes and --model.classes N"),
        ({"objective.name": "similar", "data.examples": "x", "model.head": "none", "parallel.context": 2}, "use --parallel.tensor"),
        ({"data.examples": "x", "data.text": ["y"]}, "leave data.text, data.train and data.valid out"),
        ({"train.patience": 2, "train.eval_every": 0}, "set train.eval_every"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Config().override(keys)
    assert message in str(error.value)
