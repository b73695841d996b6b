"""A model with experts in a whole run: it learns, evaluates its objective alone, resumes bit for bit, generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_parity
from tiny import assert_same_state, events, losses, state, tiny, write_text

from teratron.checkpoint import open_model
from teratron.generate import Decoder, Sampling, TokenStream
from teratron.train import Trainer
from teratron.train.engine import pad_sequences

MOE: dict[str, Any] = {"model__experts": 6, "model__expert_ffn": 16, "model__layers": 2}
STYLES: dict[str, dict[str, Any]] = {
    "aux": MOE | {"model__z_loss": 1e-3, "model__capacity": 1.5, "model__shared_experts": 1},
    "bias": MOE | {"model__router_balance": "bias", "model__bias_rate": 0.01, "model__router": "sigmoid", "model__normalise_gates": True},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("moe") / "text.txt")


def train(text: Path, run: Path, **keys: Any) -> Path:
    Trainer(tiny(text, **keys), run, device="cpu", echo=False).train()
    return run


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("keys", [{}, {"train__precision": "bf16", "train__recompute": "full"}], ids=["fp32", "bf16-recomputed"])
def test_a_run_of_two_halves_equals_an_uninterrupted_one(text: Path, tmp_path: Path, style: str, keys: dict[str, Any]) -> None:
    settings = STYLES[style] | keys | {"optim__schedule": "constant"}
    whole = train(text, tmp_path / "whole", **settings)
    halves = train(text, tmp_path / "halves", **settings, train__steps=4)
    train(text, halves, **settings)
    assert_same_state(whole, halves)
    assert losses(whole) == losses(halves)
    found = state(whole)
    assert found["weight/blocks.0.ffn.experts.up.weight"].shape == (6, 16, 16)
    if style == "bias":
        for name in ("weight/blocks.0.ffn.router.bias", "weight/blocks.1.ffn.router.bias"):
            assert found[name].dtype == torch.float32
            steps = found[name] / 0.01
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
            assert 0 < steps.abs().max() <= 6.001
        assert not any("router.bias" in name for name in found if not name.startswith("weight/"))


def test_it_learns_and_tells_its_terms_but_evaluates_the_objective_alone(text: Path, tmp_path: Path) -> None:
    run = train(text, tmp_path / "run", **STYLES["aux"], model__aux_loss=0.5, train__steps=40, train__eval_every=20, model__dropout=0.0)
    steps, evaluations = events(run, "step"), events(run, "eval")
    assert steps[-1]["terms"]["next_token"] < steps[0]["terms"]["next_token"] - 0.5
    for event in steps:
        terms = event["terms"]
        assert event["loss"] == pytest.approx(terms["next_token"] + 0.5 * terms["aux_loss"] + 1e-3 * terms["z_loss"], rel=1e-6)
        assert terms["aux_loss"] > 0.5  # two layers, near 1 each
    for event in evaluations:
        assert event["loss"] == event["terms"]["next_token"]
        assert event["terms"]["aux_loss"] > 0.5


@pytest.mark.parametrize("rate", [0.02, 1e-6])
def test_only_a_bias_that_moves_evens_the_loads_in_training(text: Path, tmp_path: Path, rate: float) -> None:
    settings = STYLES["bias"] | {"model__layers": 1, "model__bias_rate": rate, "optim__lr": 1e-4, "model__init_std": 0.2}
    settings |= {"train__steps": 30, "train__eval_every": 0, "train__global_batch": 32, "train__micro_batch": 0}
    made = Trainer(tiny(text, **settings), tmp_path / "run", device="cpu", echo=False)
    loads = []
    router = made.engine.model.blocks["0"].ffn.router
    router.register_forward_hook(lambda module, inputs, routing: loads.append(routing.load_E.double()))
    made.train()
    early, late = (float(torch.stack(part).mean(0).max() / loads[0].mean()) for part in (loads[:3], loads[20:30]))
    assert early > 1.5
    assert (late < 1.25) is (rate == 0.02), (early, late)


@pytest.mark.parametrize("style", STYLES)
def test_generation_with_a_cache_equals_full_passes(text: Path, tmp_path: Path, style: str) -> None:
    """Without a limit in both: a full pass of its own would drop tokens that a cached one keeps."""
    run = train(text, tmp_path / "run", **STYLES[style] | {"model__capacity": 0.0}, model__init_std=0.5, train__steps=2)
    model = open_model(run, "cpu", torch.float64).model
    prompt = [3, 1, 4]
    stream = TokenStream(Decoder(model, [prompt, [2]], 4), Sampling(temperature=0))
    found = [token for step in stream for row, token in step if row == 0]
    tokens = list(prompt)
    for _ in range(4):
        given = {"tokens": torch.tensor([tokens]), "positions": torch.arange(len(tokens))[None]}
        with torch.no_grad():
            tokens.append(int(model.head.output(model(given)["hidden"])[0, -1, : model.config.vocab_size].argmax()))
    assert found == tokens[3:]


@pytest.mark.parametrize("style", STYLES)
def test_micro_batches_change_nothing(text: Path, tmp_path: Path, style: str) -> None:
    settings = STYLES[style] | {"train__precision": "fp64", "train__steps": 4, "model__init_std": 0.3}
    runs = [train(text, tmp_path / f"micro-{size}", **settings, train__micro_batch=size) for size in (1, 4)]
    found, expected = state(runs[0]), state(runs[1])
    assert_parity(found, expected, tol=1e-9, lr=1e-2, steps=4)
    biases = [name for name in expected if name.endswith("router.bias")]
    assert len(biases) == (2 if style == "bias" else 0)
    assert all(torch.equal(found[name], expected[name]) and expected[name].any() for name in biases)


def test_padded_sequences_say_which_tokens_are_real() -> None:
    batch = {"tokens": torch.ones(2, 6, dtype=torch.int64), "positions": torch.arange(6).expand(2, 6), "sample": torch.arange(2)}
    assert "real" not in pad_sequences(batch, 3, {"": True})
    padded = pad_sequences(batch, 4, {"": True})
    assert padded["real"].tolist() == [[True] * 6 + [False] * 2] * 2
