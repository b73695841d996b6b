"""Bad numbers in one process: what a spike is, where to go back to, which overflow is none, and what is said of it."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_state, events, losses, tiny, write_text
from torch import Tensor

from teratron.checkpoint import newest_checkpoint, saved_state
from teratron.checkpoint.reader import checkpoint_folders
from teratron.config import Config, UserError
from teratron.train import Trainer
from teratron.train.replicas import CHUNK, digest
from teratron.train.spikes import SPIKES_ALLOWED, checkpoint_before, is_spike, leave_out, remove_given_up, zscore

DRAW = random.Random(3)
SPIKES = {"train__spike_zscore": 20.0, "train__spike_window": 8, "train__steps": 20, "checkpoint__every": 4, "train__eval_every": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("guard") / "text.txt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_flipped_bit_and_any_exchange_changes_the_digest(dtype: torch.dtype) -> None:
    values = torch.randn(2 * CHUNK + 7).to(dtype)
    before = digest(values)
    assert digest(values.clone()) == before
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    for place, bit in itertools.product((0, CHUNK - 1, CHUNK, len(values) - 1), range(8 * values.element_size())):
        flipped = values.clone()
        flipped.view(integers)[place] ^= torch.tensor(2**bit if bit < 8 * values.element_size() - 1 else -(2**bit)).to(integers)
        assert not torch.equal(flipped.view(integers), values.view(integers))
        assert digest(flipped) != before, (place, bit)
    for a, b in ((0, 1), (3, CHUNK + 3), (CHUNK, 2 * CHUNK)):
        exchanged = values.clone()
        exchanged[a], exchanged[b] = values[b], values[a]
        assert digest(exchanged) != before


def test_a_spike_is_counted_in_deviations_of_the_last_losses() -> None:
    """Of normal losses the robust deviation is the usual one; a few wild ones among them hardly move it."""
    normal = [3 + 0.1 * DRAW.gauss(0, 1) for _ in range(4001)]
    assert zscore(3.5, normal) == pytest.approx(5, rel=0.1)
    assert zscore(3.5, [*normal, *[1e6] * 40]) == pytest.approx(5, rel=0.1)
    assert zscore(2.0, [2.0] * 9) == 0
    assert zscore(2.02, [2.0] * 9) == pytest.approx(10), "losses that never differ scatter by a thousandth"
    config = Config().override({"train.spike_zscore": 4, "train.spike_window": 8}).train
    assert is_spike(9.0, [2.0] * 8, config)
    assert not is_spike(-9.0, [2.0] * 8, config), "a loss that falls is none"
    assert not is_spike(9.0, [2.0] * 7, config), "the window is not full"
    assert not is_spike(math.nan, [2.0] * 8, config)
    assert not is_spike(9.0, [2.0] * 8, Config().train)


def test_each_spike_leaves_out_as_many_steps_more_until_there_are_too_many() -> None:
    config = Config().override({"train.spike_zscore": 4, "train.spike_skip": 3}).train
    first = leave_out((), 10, config)
    assert first == (8, 9, 10)
    assert leave_out(first, 11, config) == (6, 7, 8, 9, 10, 11)
    assert leave_out(first, 40, config) == (8, 9, 10, 38, 39, 40)
    assert leave_out((), 2, config) == (1, 2), "there is no step 0"
    many: tuple[int, ...] = ()
    for step in range(50, 50 + SPIKES_ALLOWED):
        many = leave_out(many, step, config)
    with pytest.raises(UserError, match="step 60: the loss spiked again after 3 returns within 100 steps: stopped without saving"):
        leave_out(many, 60, config)
    assert leave_out(many, 200, config)[-3:] == (198, 199, 200), "long ago"


@pytest.mark.parametrize(("key", "value"), [("every", 0), ("keep", 1)])
def test_going_back_without_checkpoints_is_refused(key: str, value: int) -> None:
    with pytest.raises(UserError, match=f"goes back to an earlier checkpoint, of which checkpoint.{key} = {value} leaves none"):
        Config().override({"train.spike_zscore": 6.0, f"checkpoint.{key}": value})


class Planted:
    """Makes the batch of some steps of a trainer a spike: its targets are the rarest tokens, far from what is learnt."""

    def __init__(self, trainer: Trainer, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.steps, self.original = trainer.engine, steps, trainer.engine.step
        self.made: list[int] = []
        """Every step that was made."""
        monkeypatch.setattr(trainer.engine, "step", self.step)

    def step(self, batch: dict[str, Tensor], *, step: int, **more: Any) -> Any:
        self.made.append(step)
        tally, norm = self.original(batch, step=step, **more)
        if step in self.steps:
            tally.sums["next_token"].sum.mul_(100)  # the loss as a bad batch would give it
        return tally, norm


def spiked(text: Path, run: Path, steps: set[int], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Planted:
    trainer = Trainer(tiny(text, **SPIKES | keys), run, device="cpu", echo=False)
    planted = Planted(trainer, steps, monkeypatch)
    trainer.train()
    return planted


def test_a_spike_goes_back_and_leaves_its_batches_out(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = spiked(text, tmp_path / "run", {14}, monkeypatch)
    assert planted.made == [*range(1, 15), *range(15, 21)], "back to step 12, from where 13 and 14 are left out"
    (event,) = events(tmp_path / "run", "spike")
    assert (event["step"], event["back_to"], event["left_out"]) == (14, 12, [13, 14])
    assert event["deviations"] > 20
    checkpoint = newest_checkpoint(tmp_path / "run", print)
    assert checkpoint is not None
    saved = saved_state(checkpoint)
    assert (saved.step, saved.left_out, saved.skipped) == (20, (13, 14), 2)
    assert saved.tokens == 18 * 4 * 8
    assert saved.losses == tuple(losses(tmp_path / "run")[step] for step in [*range(11, 13), *range(15, 21)]), "bit for bit, through JSON"


def test_a_spike_before_the_first_checkpoint_begins_anew(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = spiked(text, tmp_path / "run", {11}, monkeypatch, checkpoint__every=50)
    assert planted.made == [*range(1, 12), *range(1, 10), *range(12, 21)]


def test_what_was_saved_on_the_way_given_up_is_removed(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spikes in steps 13 and 16: the first leads back behind step 12, the second to what was saved there on the new way."""
    planted = spiked(text, tmp_path / "run", {13, 16}, monkeypatch, train__spike_skip=3)
    assert planted.made == [*range(1, 14), 9, 10, *range(14, 21)]
    found = events(tmp_path / "run", "spike")
    assert [(event["back_to"], event["left_out"]) for event in found] == [(8, [11, 12, 13]), (12, [11, 12, 13, 14, 15, 16])]
    remove_given_up(tmp_path / "run", 20)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["step-00000016"]
    with pytest.raises(UserError, match="no good checkpoint lies before step 16, the first to be left out"):
        checkpoint_before(tmp_path / "run", 16, [16], print)


def test_every_interruption_of_a_run_with_spikes_leads_to_the_same_state(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two spikes, the second just behind the first; stopped after any step, saved there or not, and gone on: bit for bit the same."""
    keys = {"checkpoint__keep": 0, "checkpoint__asynchronous": False}  # no thread of a dead run may go on writing
    spiked(text, tmp_path / "whole", {12, 14}, monkeypatch, **keys)
    assert [event["step"] for event in events(tmp_path / "whole", "spike")] == [12, 14]

    class Killed(Exception):
        pass

    for call in (10, 13, 15, 18):
        run = tmp_path / str(call)
        trainer = Trainer(tiny(text, **SPIKES | keys), run, device="cpu", echo=False)
        planted = Planted(trainer, {12, 14}, monkeypatch)

        def step(*args: Any, planted: Planted = planted, call: int = call, **more: Any) -> Any:
            if len(planted.made) == call:
                raise Killed
            return planted.step(*args, **more)

        monkeypatch.setattr(trainer.engine, "step", step)
        with pytest.raises(Killed):
            trainer.train()
        spiked(text, run, {12, 14}, monkeypatch, **keys)
        assert_same_state(run, tmp_path / "whole")


class Plant:
    """Multiplies a module's output by a number, in the calls that are counted."""

    def __init__(self, trainer: Trainer, name: str, factor: float, calls: range) -> None:
        self.factor, self.calls, self.seen = factor, calls, 0
        dict(trainer.engine.model.named_modules())[name].register_forward_hook(self.spoil)

    def spoil(self, module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        self.seen += 1
        return output * self.factor if self.seen in self.calls else None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_module_that_makes_nan_is_named_and_the_run_halts(text: Path, tmp_path: Path, precision: str) -> None:
    """In fp16 too, at a loss scale far above its least: none cures what is not finite in the forward pass."""
    keys = {"model__layers": 3, "train__eval_every": 0, "train__precision": precision, "optim__initial_loss_scale": 2.0**12}
    trainer = Trainer(tiny(text, **keys), tmp_path / "run", device="cpu", echo=False)
    Plant(trainer, "blocks.1.ffn.down", math.nan, range(6, 100))  # two micro-batches a step: from the second of step 3 on
    told = r"step 3: the loss is nan; first not finite: the output of blocks\.1\.ffn\.down in the forward pass of micro-batch 1 on rank 0"
    with pytest.raises(UserError, match=told) as error:
        trainer.train()
    assert "stopped without saving" in str(error.value)
    (event,) = events(tmp_path / "run", "bad_numbers")
    assert (event["step"], event["loss"], event["fault"]) == (3, None, "reproducible")
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [2]


def test_a_fault_that_does_not_come_again_is_called_transient(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(tiny(text, train__eval_every=0, train__on_bad_numbers="skip"), tmp_path / "run", device="cpu")
    Plant(trainer, "blocks.0.ffn.down", math.nan, range(6, 7))
    assert trainer.train().step == 6
    told = "step 3: the loss is nan: the update was skipped; the same step made again is finite: a transient fault"
    assert told in capsys.readouterr().out
    assert [event["fault"] for event in events(tmp_path / "run", "bad_numbers")] == ["transient"]


def test_overflows_of_the_loss_scale_are_told_apart_from_nan(text: Path, tmp_path: Path) -> None:
    """An adjusted scale is left to fall; at a fixed one the step is made again without it, and found sound."""
    keys = {"train__precision": "fp16", "train__eval_every": 0, "checkpoint__every": 0}
    trainer = Trainer(tiny(text, **keys, optim__initial_loss_scale=2.0**20), tmp_path / "adjusted", device="cpu", echo=False)
    trainer.train()
    assert any(event.get("skipped") for event in events(tmp_path / "adjusted", "step")), "or nothing could be told apart"
    assert events(tmp_path / "adjusted", "bad_numbers") == []
    fixed = Trainer(tiny(text, **keys, optim__loss_scale=2.0**24), tmp_path / "fixed", device="cpu", echo=False)
    with pytest.raises(
        UserError, match=r"with loss scale 1 in place of 1\.67772e\+07 it is finite: an overflow: .* lower optim.loss_scale"
    ):
        fixed.train()
    assert [event["fault"] for event in events(tmp_path / "fixed", "bad_numbers")] == ["overflow"]


def test_a_nan_that_stays_at_the_least_loss_scale_is_real(text: Path, tmp_path: Path) -> None:
    """A gradient alone is NaN, in every step: the scale falls first, and only then the run halts."""
    keys = {"train__precision": "fp16", "train__eval_every": 0, "train__steps": 20, "optim__loss_scale_hysteresis": 1}
    trainer = Trainer(tiny(text, **keys, optim__initial_loss_scale=8.0), tmp_path / "run", device="cpu", echo=False)
    weight = dict(trainer.engine.model.named_parameters())["blocks.0.attention.output.weight"]
    weight.register_hook(lambda slope: slope * math.nan)
    told = r"step 4: the gradient norm is nan; first not finite: the gradient of blocks\.0\.attention\.output\.weight on rank 0"
    with pytest.raises(UserError, match=told):
        trainer.train()
    assert [event["loss_scale"] for event in events(tmp_path / "run", "step")] == [8, 4, 2, 1]


def test_a_processor_that_computes_otherwise_each_time_is_found_on_one_rank(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(text, train__verify_every=4, train__eval_every=0), tmp_path / "run", device="cpu", echo=False)
    Plant(trainer, "blocks.0.ffn.down", 1 + 1e-6, range(11, 12))  # once, in step 5
    told = "step 4: the same step computed twice differs on rank 0: a transient fault of the processor or memory: stopped without saving"
    with pytest.raises(UserError, match=told):  # its 8 micro-batches, then 2 and 2: the 11th is among those of the second time
        trainer.train()
    (event,) = events(tmp_path / "run", "corruption")
    assert (event["ranks"], event["fault"]) == ([0], "transient")


def test_looking_changes_nothing(text: Path, tmp_path: Path) -> None:
    for name, keys in (
        ("plain", {}),
        ("looking", {"train__verify_every": 2, "train__spike_zscore": 50.0, "train__on_bad_numbers": "skip"}),
    ):
        Trainer(tiny(text, **keys), tmp_path / name, device="cpu", echo=False).train()
    assert_same_state(tmp_path / "plain", tmp_path / "looking")
