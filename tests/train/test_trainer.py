"""The trainer: the same numbers however a batch is cut, in every precision; a step without a finite gradient changes nothing."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_parity
from tiny import assert_same_state, events, losses, state, tiny, write_text
from torch import Tensor

from teratron.checkpoint import newest_checkpoint, saved_state
from teratron.config import UserError
from teratron.optim import LossScale
from teratron.train import Trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("trainer") / "text.txt")


def trained(text: Path, run: Path, **keys: Any) -> Trainer:
    trainer = Trainer(tiny(text, **keys), run, device="cpu", echo=False)
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Masters and moments."""
    return {piece.name: piece.values.clone() for piece in trainer.optimizer.pieces()}


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
    """40 steps from the same seed: float32 within 1e-4 of float64's loss, bfloat16 within 2 %, float16 within 0.5 %; all learn."""
    found = {}
    for precision in ("fp64", "fp32", "bf16", "fp16"):
        keys = {"train__precision": precision, "train__steps": 40, "train__eval_every": 0, "checkpoint__every": 0}
        keys |= {"optim__initial_loss_scale": 2.0**12}  # no step is skipped
        trained(text, tmp_path / precision, **keys)
        found[precision] = losses(tmp_path / precision)
    for step, exact in found["fp64"].items():
        assert found["fp32"][step] == pytest.approx(exact, rel=1e-4)
        assert found["bf16"][step] == pytest.approx(exact, rel=2e-2)
        assert found["fp16"][step] == pytest.approx(exact, rel=5e-3)
        assert exact not in (found["bf16"][step], found["fp16"][step])
    assert all(series[40] < series[1] - 0.3 for series in found.values())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_types_keep_float32_masters(text: Path, tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    trainer = trained(text, tmp_path / "run", train__precision=precision)
    assert {p.dtype for p in trainer.engine.model.parameters()} == {dtype}
    assert {tensor.dtype for tensor in state(tmp_path / "run").values()} == {torch.float32}


class Spoiled:
    """Plants an infinite gradient in some steps of a trainer, and notes what each update saw and changed."""

    def __init__(self, trainer: Trainer, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer, self.steps, self.step = trainer, steps, trainer.optimizer.step
        self.numbers: list[int] = []
        """The number of the update in each step."""
        self.unchanged: list[int] = []
        """Steps after which masters and moments were the same bit for bit."""
        monkeypatch.setattr(trainer.optimizer, "step", self.spoiled)

    def spoiled(self, number: int, lr: float, loss_scale: float) -> Tensor:
        self.numbers.append(number)
        if len(self.numbers) in self.steps:
            self.trainer.engine.flat.trained[0].gradient[3] = math.inf
        before = weights(self.trainer)
        norm = self.step(number, lr, loss_scale)
        if all(torch.equal(before[name], values) for name, values in weights(self.trainer).items()):
            self.unchanged.append(len(self.numbers))
        return norm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_is_skipped_said_and_survived(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    keys = {"checkpoint__every": 0, "train__eval_every": 0, "train__precision": precision, "train__on_bad_numbers": "skip"}
    trainer = Trainer(tiny(text, **keys), tmp_path / "run", device="cpu")
    spoiled = Spoiled(trainer, {3}, monkeypatch)
    result = trainer.train()
    assert (result.step, result.interrupted) == (6, False)
    assert math.isfinite(result.loss)
    assert "step 3: the gradient norm is inf: the update was skipped" in capsys.readouterr().out
    assert spoiled.unchanged == [3]
    assert spoiled.numbers == [1, 2, 3, 3, 4, 5], "the bias correction counts updates, not steps"
    steps = events(tmp_path / "run", "step")
    assert [event["step"] for event in steps if event["grad_norm"] is None] == [3]
    assert [event["step"] for event in steps if event.get("skipped")] == [3]
    assert not any("loss_scale" in event for event in steps)
    assert all(torch.isfinite(tensor).all() for tensor in state(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("hysteresis", "scales"),
    [(1, [4096, 4096, 2048, 2048, 1024, 1024]), (2, [4096, 4096, 4096, 4096, 2048, 2048]), (3, [4096] * 6)],
)
def test_an_overflow_in_fp16_is_skipped_and_lowers_the_scale(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hysteresis: int, scales: list[int]
) -> None:
    """Planted in steps 2 and 4: the scale falls from the step after the one that fills the measure."""
    keys = {"train__precision": "fp16", "optim__initial_loss_scale": 2.0**12, "optim__loss_scale_hysteresis": hysteresis}
    trainer = Trainer(tiny(text, **keys), tmp_path / "run", device="cpu")
    spoiled = Spoiled(trainer, {2, 4}, monkeypatch)
    trainer.train()
    steps = events(tmp_path / "run", "step")
    assert spoiled.unchanged == [2, 4] == [event["step"] for event in steps if event.get("skipped")]
    assert spoiled.numbers == [1, 2, 2, 3, 3, 4]
    assert [event["loss_scale"] for event in steps] == scales
    assert f"step 4: overflow in fp16: no update; loss scale now {scales[-1]}" in capsys.readouterr().out
    checkpoint = newest_checkpoint(tmp_path / "run", print)
    assert checkpoint is not None
    saved = saved_state(checkpoint)
    assert (saved.skipped, saved.loss_scale) == (2, LossScale(scales[-1], 2, 2))


def test_a_run_in_fp16_goes_on_with_its_scale(text: Path, tmp_path: Path) -> None:
    """Real overflows on the way down and up: two parts are the whole run, bit for bit."""
    keys = {"train__precision": "fp16", "optim__schedule": "constant", "optim__initial_loss_scale": 2.0**22, "checkpoint__every": 0}
    keys |= {"optim__loss_scale_window": 3, "optim__loss_scale_hysteresis": 1}
    for steps in (7, 16):
        trained(text, tmp_path / "parts", train__steps=steps, **keys)
    trained(text, tmp_path / "whole", train__steps=16, **keys)
    runs = [events(tmp_path / run, "step") for run in ("parts", "whole")]
    told = [[(event["step"], event["loss"], event["loss_scale"], event.get("skipped", False)) for event in run] for run in runs]
    assert told[0] == told[1]
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    for part in (told[0][:7], told[0][7:]):
        assert {skipped for *_, skipped in part} == {True, False}, "or nothing could go wrong"
    assert told[0][7][2] not in (2.0**22, told[0][0][2])
    scales = [scale for _, _, scale, _ in told[0]]
    assert any(later > earlier for earlier, later in itertools.pairwise(scales)), "it also grew"


def test_a_run_whose_updates_are_all_skipped_ends_with_a_sentence(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"train__steps": 20, "checkpoint__every": 5, "train__eval_every": 0, "train__on_bad_numbers": "skip"}
    trainer = Trainer(tiny(text, **keys), tmp_path / "run", device="cpu", echo=False)
    Spoiled(trainer, set(range(7, 21)), monkeypatch)
    with pytest.raises(UserError, match=r"step 16: .* 10 updates in a row were skipped: stopped without saving"):
        trainer.train()


@pytest.mark.parametrize("keys", [{"train__recompute": "full"}, {"train__recompute": "selective", "model__attention_dropout": 0.1}])
def test_recomputation_changes_nothing(text: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    plain = {name: value for name, value in keys.items() if name != "train__recompute"}
    for name, settings in (("plain", plain), ("again", keys), ("rare", {**keys, "train__recompute_every": 2})):
        trained(text, tmp_path / name, model__layers=2, **settings)
        assert_same_state(tmp_path / "plain", tmp_path / name)
        assert losses(tmp_path / "plain") == losses(tmp_path / name)


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
