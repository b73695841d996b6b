"""The trainer: the same numbers however a batch is cut, in every precision; a step without a finite gradient changes nothing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_parity
from tiny import assert_same_state, events, losses, state, tiny, write_text
from torch import Tensor

from teratron.checkpoint.training import state_tensors
from teratron.config import UserError
from teratron.train import Trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("trainer") / "text.txt")


def trained(text: Path, run: Path, **keys: Any) -> Trainer:
    trainer = Trainer(tiny(text, **keys), run, device="cpu", echo=False)
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: view.clone() for name, view in state_tensors(trainer.optimizer)}


@pytest.mark.parametrize(("precision", "tol"), [("fp64", 1e-9), ("fp32", 1e-4)])
@pytest.mark.parametrize("keys", [{}, {"model__attention_dropout": 0.2}, {"data__isolate_documents": True, "data__tokenizer": "bytes"}])
def test_micro_batches_change_nothing(text: Path, tmp_path: Path, keys: dict[str, Any], precision: str, tol: float) -> None:
    """Dropout on, three steps: gradient accumulation is exact but for the order of additions (contract C1)."""
    settings = {"train__steps": 3, "train__precision": precision, "train__eval_every": 0} | keys
    # Adam divides a gradient by its own size: with a smaller eps, one that is all rounding moves its weight as far as any other.
    settings |= {"optim__eps": 1e-6}
    whole = weights(trained(text, tmp_path / "whole", train__micro_batch=0, **settings))
    for size in (1, 2):
        cut = weights(trained(text, tmp_path / str(size), train__micro_batch=size, **settings))
        assert_parity(cut, whole, tol, lr=1e-2, steps=3)


def test_dropout_changes_the_numbers(text: Path, tmp_path: Path) -> None:
    """Or the test above would hold for a model that never drops."""
    with_dropout, without = (trained(text, tmp_path / str(p), model__dropout=p, train__steps=2) for p in (0.2, 0.0))
    assert any(not torch.equal(a, b) for a, b in zip(weights(with_dropout).values(), weights(without).values(), strict=True))


def test_the_same_seed_is_the_same_run_and_another_is_not(text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained(text, tmp_path / name, train__seed=seed)
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_precisions_agree_within_their_bands(text: Path, tmp_path: Path) -> None:
    """40 steps from the same seed: float32 within 1e-4 of float64's loss, bfloat16 within 2 % of it; all of them learn."""
    found = {}
    for precision in ("fp64", "fp32", "bf16"):
        keys = {"train__precision": precision, "train__steps": 40, "train__eval_every": 0, "checkpoint__every": 0}
        trained(text, tmp_path / precision, **keys)
        found[precision] = losses(tmp_path / precision)
    for step, exact in found["fp64"].items():
        assert found["fp32"][step] == pytest.approx(exact, rel=1e-4)
        assert found["bf16"][step] == pytest.approx(exact, rel=2e-2)
        assert found["bf16"][step] != exact
    assert all(series[40] < series[1] - 0.3 for series in found.values())


def test_half_types_keep_float32_masters(text: Path, tmp_path: Path) -> None:
    trainer = trained(text, tmp_path / "run", train__precision="bf16")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state(tmp_path / "run").values()} == {torch.float32}


def test_a_gradient_that_is_not_finite_is_skipped_said_and_survived(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny(text, checkpoint__every=0, train__eval_every=0), tmp_path / "run", device="cpu")
    steps, collect, before = 0, trainer.optimizer.collect, {}

    def spoiled() -> None:
        nonlocal steps, before
        collect()
        steps += 1
        if steps == 5:  # two micro-batches a step: the first of step 3
            trainer.optimizer.buckets[0].gradient[3] = math.inf
            before = weights(trainer)
        elif steps == 7:
            assert all(torch.equal(before[name], view) for name, view in weights(trainer).items())

    monkeypatch.setattr(trainer.optimizer, "collect", spoiled)
    result = trainer.train()
    assert (result.step, result.interrupted) == (6, False)
    assert math.isfinite(result.loss)
    assert "step 3: the gradient norm is inf: the update was skipped" in capsys.readouterr().out
    norms = {event["step"]: event["grad_norm"] for event in events(tmp_path / "run", "step")}
    assert [step for step, norm in norms.items() if norm is None] == [3]
    assert all(torch.isfinite(tensor).all() for tensor in state(tmp_path / "run").values())
    assert any(not torch.equal(before[name], view) for name, view in weights(trainer).items())


def test_results_and_metrics_tell_the_same(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(text), tmp_path / "run", device="cpu", echo=False)
    result = trainer.train()
    assert result.step == 6
    assert result.loss == losses(tmp_path / "run")[6]
    evaluations = {event["step"]: event["loss"] for event in events(tmp_path / "run", "eval")}
    assert list(evaluations) == [3, 6]
    assert result.valid_loss == evaluations[6] == trainer.evaluate()
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [2, 4, 6]
    assert [event["reason"] for event in events(tmp_path / "run", "end")] == ["done"]


def test_the_peak_is_measured_and_mfu_is_a_share_of_it(text: Path, tmp_path: Path, measured: None) -> None:
    trained(text, tmp_path / "run")
    (start,) = events(tmp_path / "run", "start")
    assert start["peak_flops"] > 1e8
    for event in events(tmp_path / "run", "step"):
        assert 0 < event["mfu"] < 1
        assert event["mfu"] == pytest.approx(event["tokens_per_second"] * start["flops_per_token"] / start["peak_flops"])


def test_evaluation_falls_on_its_steps_and_the_last(text: Path, tmp_path: Path) -> None:
    for every, expected in ((0, [5]), (2, [2, 4, 5]), (9, [5])):
        trained(text, tmp_path / str(every), train__steps=5, train__eval_every=every)
        assert [event["step"] for event in events(tmp_path / str(every), "eval")] == expected


def test_silence_is_kept_on_request(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained(text, tmp_path / "run")
    assert capfd.readouterr() == ("", "")


def test_a_second_trainer_waits_until_the_first_is_done(text: Path, tmp_path: Path) -> None:
    first = Trainer(tiny(text), tmp_path / "run", device="cpu", echo=False)
    with pytest.raises(UserError, match="another process is training here"):
        Trainer(tiny(text), tmp_path / "run", device="cpu", echo=False)
    first.train()
    assert Trainer(None, tmp_path / "run", device="cpu", echo=False).state.step == 6
    assert first.train().step == 6, "nothing is left to do"


def test_a_refused_trainer_lets_go_of_the_folder(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.seq_length = 4000") as kept:
        Trainer(tiny(text, model__seq_length=4000), tmp_path / "run", device="cpu", echo=False)
    assert kept.traceback, "which holds the refused trainer alive, as an interactive session does"
    trained(text, tmp_path / "run")


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.compile(r"parameters in fp32 need .* GiB .* are free on cpu: choose a smaller model")):
        Trainer(tiny(text, model__hidden=2**20), tmp_path / "run", device="cpu", echo=False)
    assert not (tmp_path / "run" / "config.toml").exists()
