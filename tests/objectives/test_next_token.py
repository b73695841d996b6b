"""The loss is exact over the global batch: a sum over a count, never a mean of means (contract C2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teratron.config import Config, ModelConfig
from teratron.models import Model, build_model, initialise
from teratron.objectives import Batch, Objective, Term, build_objective, total_loss

CONFIG = ModelConfig(layers=1, hidden=16, heads=2, seq_length=8, vocab_size=30, init_std=0.3)


def batch_of(samples: int) -> Batch:
    """A batch whose weights are uneven, with samples that hardly count and one that does not at all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (samples, CONFIG.seq_length + 1), generator=generator)
    share = torch.linspace(0, 1, samples)[:, None] ** 2
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": share * torch.rand((samples, CONFIG.seq_length), generator=generator),
        "positions": torch.arange(CONFIG.seq_length).expand(samples, -1),
        "segments": torch.zeros((samples, CONFIG.seq_length), dtype=torch.int64),
        "sample": torch.arange(samples),
    }


def made() -> tuple[Model, Objective]:
    model = build_model(CONFIG, dtype=torch.float64)
    initialise(model, 1)
    return model, build_objective(Config())


def loss_and_gradients(sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """One global batch as micro-batches of these sizes."""
    model, objective = made()
    batch = batch_of(sum(sizes))
    counts = objective.counts(batch)
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(sum(sizes)).split(sizes):
        micro = {name: values[rows] for name, values in batch.items()}
        loss = total_loss(objective.terms(model, model(objective.inputs(micro)), micro), counts)
        loss.backward()
        total += loss.detach()
    return total, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [3, 2, 1]])
def test_micro_batches_of_any_size_equal_the_whole_batch(sizes: list[int]) -> None:
    whole, expected = loss_and_gradients([6])
    loss, gradients = loss_and_gradients(sizes)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12 * float(right.abs().max()))


def test_the_loss_is_the_weighted_mean_and_not_the_mean_of_means() -> None:
    model, objective = made()
    batch = batch_of(6)
    with torch.no_grad():
        logits = model.head.output(model(objective.inputs(batch))["hidden"])
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none").view(6, -1)
    weights = batch["weights"].double()
    exact = float((losses * weights).sum() / weights.sum())
    mean_of_means = float(((losses * weights)[1:].sum(1) / weights[1:].sum(1)).mean())
    found, _ = loss_and_gradients([2, 2, 2])
    assert found.item() == pytest.approx(exact, rel=1e-12)
    assert abs(found.item() - mean_of_means) > 1e-2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    """Over the vocabulary without its padding, each token by its weight."""
    model, batch = made()[0], batch_of(6)
    objective = build_objective(Config().override({"objective.label_smoothing": smoothing}))
    state = model(objective.inputs(batch))
    found = total_loss(objective.terms(model, state, batch), objective.counts(batch))
    logits, targets = model.head.output(state["hidden"]).flatten(0, 1), batch["targets"].flatten()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    weights = batch["weights"].flatten().double()
    expected = (losses * weights).sum() / weights.sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    parameters = list(model.parameters())
    right = torch.autograd.grad(expected, parameters, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(found, parameters), right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


def test_counts_are_exact_however_the_global_batch_is_cut() -> None:
    batch = batch_of(64)
    objective = build_objective(Config())
    whole = objective.counts(batch)["next_token"]
    parts = sum(float(objective.counts({"weights": part})["next_token"]) for part in batch["weights"].split(5))
    assert parts == pytest.approx(whole.item(), rel=1e-15)


def test_terms_are_weighted_and_a_batch_without_weight_has_loss_zero() -> None:
    terms = [Term("a", torch.tensor(6.0)), Term("b", torch.tensor(1.0), weight=0.5), Term("c", torch.tensor(0.0))]
    counts = {"a": torch.tensor(3.0), "b": torch.tensor(2.0), "c": torch.tensor(0.0)}
    assert total_loss(terms, counts).item() == 2.25


def test_inputs_hold_what_the_model_reads_and_nothing_else() -> None:
    _, objective = made()
    batch = batch_of(2)
    assert set(objective.inputs(batch)) == {"tokens", "positions", "segments"}
    del batch["segments"]
    assert set(objective.inputs(batch)) == {"tokens", "positions"}


def test_a_range_of_units_without_head_has_no_terms() -> None:
    model, objective = build_model(CONFIG, range(1)), build_objective(Config())
    assert objective.terms(model, {"hidden": torch.zeros(1, 8, 16)}, batch_of(1)) == []
