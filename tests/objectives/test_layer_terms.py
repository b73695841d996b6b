"""The layers' terms are exact over the global batch, known by name, and weigh what the config says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from teratron.config import Config, ModelConfig
from teratron.models import Model, build_model, initialise
from teratron.objectives import Batch, build_objective, layer_counts, layer_loads, layer_terms, total_loss

torch.set_num_threads(1)

CONFIG = ModelConfig(
    layers=2, hidden=16, heads=2, ffn=24, seq_length=8, vocab_size=30, init_std=0.3,
    experts=4, shared_experts=1, capacity=1.0, aux_loss=0.7, z_loss=0.3,
)  # fmt: skip
STYLES = {
    "aux": CONFIG,
    "sigmoid": dataclasses.replace(CONFIG, router="sigmoid", normalise_gates=True, capacity=0.0),
    "bias": dataclasses.replace(CONFIG, router_balance="bias", z_loss=0.0),
}


def made(config: ModelConfig) -> Model:
    model = build_model(config, dtype=torch.float64)
    initialise(model, 1)
    return model


def batch_of(samples: int, padded: bool = True) -> Batch:
    """Sequences of different real lengths, uneven weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (samples, CONFIG.seq_length + 1), generator=generator)
    segments = torch.zeros((samples, CONFIG.seq_length), dtype=torch.int64)
    for sample in range(samples if padded else 0):
        segments[sample, CONFIG.seq_length - sample :] = -1
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": torch.rand((samples, CONFIG.seq_length), generator=generator) * (segments >= 0),
        "positions": torch.arange(CONFIG.seq_length).expand(samples, -1),
        "segments": segments,
        "sample": torch.arange(samples),
    }


def learned(config: ModelConfig, sizes: list[int]) -> tuple[dict[str, float], list[Tensor], dict[str, Tensor]]:
    """Sums of terms, gradients and loads of one global batch as micro-batches of these sizes."""
    model, objective, batch = made(config), build_objective(Config()), batch_of(sum(sizes))
    counts = objective.counts(batch) | layer_counts(model, batch)
    sums: dict[str, float] = {}
    loads: dict[str, Tensor] = {}
    for rows in torch.arange(sum(sizes)).split(sizes):
        micro = {name: values[rows] for name, values in batch.items()}
        state = model(objective.inputs(micro))
        terms = [*objective.terms(model, state, micro), *layer_terms(model, state)]
        total_loss(terms, counts).backward()
        sums = {term.name: sums.get(term.name, 0.0) + term.sum.item() for term in terms}
        loads = {name: load + loads.get(name, 0) for name, load in layer_loads(state).items()}
    return sums, [parameter.grad for parameter in model.parameters() if parameter.grad is not None], loads


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [3, 2, 1]])
def test_micro_batches_of_any_size_equal_the_whole_batch(style: str, sizes: list[int]) -> None:
    expected, slopes, loads = learned(STYLES[style], [6])
    found, found_slopes, found_loads = learned(STYLES[style], sizes)
    assert set(expected) == {"next_token"} | ({"aux_loss"} if style != "bias" else set()) | ({"z_loss"} if style != "bias" else set())
    assert found == pytest.approx(expected, rel=1e-12)
    for slope, right in zip(found_slopes, slopes, strict=True):
        torch.testing.assert_close(slope, right, rtol=0, atol=1e-12 * float(right.abs().max()))
    assert len(loads) == 2
    for name, load in loads.items():
        assert torch.equal(found_loads[name], load)
        assert load.sum() == 2 * (batch_of(6)["segments"] >= 0).sum()


@pytest.mark.parametrize("padded", [False, True])
def test_counts_are_sequences_and_real_tokens(padded: bool) -> None:
    batch, model = batch_of(5, padded), made(CONFIG)
    real = int((batch["segments"] >= 0).sum())
    assert {name: float(count) for name, count in layer_counts(model, batch).items()} == {"aux_loss": 5.0, "z_loss": float(real)}
    assert real == (40 - 10 if padded else 40)
    del batch["segments"]
    assert layer_counts(model, batch)["z_loss"] == 40
    marked = batch | {"real": torch.ones(5, 8, dtype=torch.bool).tril()}
    assert layer_counts(model, marked)["z_loss"] == 15


def test_two_streams_count_their_sequences_once_and_their_tokens_together() -> None:
    model = made(dataclasses.replace(CONFIG, family="encoder_decoder"))
    batch = batch_of(3, padded=False)
    both = batch | {f"encoder_{name}": batch[name][:, :5] for name in ("tokens", "positions")}
    assert {name: float(count) for name, count in layer_counts(model, both).items()} == {"aux_loss": 3.0, "z_loss": 3 * (8 + 5)}
    names = ("tokens", "positions", "encoder_tokens", "encoder_positions")
    loads = layer_loads(model({name: both[name] for name in names}))
    assert {name: float(load.sum()) for name, load in loads.items()} == {
        f"{stack}.{n}.ffn.router": 2 * 3 * length for stack, length in (("encoder", 5), ("decoder", 8)) for n in range(2)
    }


def test_weights_are_the_configs_in_training_and_nothing_in_evaluation() -> None:
    model, batch = made(CONFIG), batch_of(3)
    state = model(build_objective(Config()).inputs(batch))
    assert {term.name: term.weight for term in layer_terms(model, state)} == {"aux_loss": 0.7, "z_loss": 0.3}
    told = layer_terms(model, state, training=False)
    assert {term.name: term.weight for term in told} == {"aux_loss": 0.0, "z_loss": 0.0}
    assert all(term.sum.item() > 0.1 for term in told)


def test_a_dense_model_adds_nothing() -> None:
    model, batch = made(ModelConfig(layers=1, hidden=16, heads=2, seq_length=8, vocab_size=30)), batch_of(3)
    state = model(build_objective(Config()).inputs(batch))
    assert set(state) == {"hidden"}
    assert (layer_counts(model, batch), layer_terms(model, state), layer_loads(state)) == ({}, [], {})
