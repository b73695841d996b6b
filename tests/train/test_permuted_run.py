"""Runs of families with memory or heads ahead: struck and gone on with, they end bit for bit as if never struck; what generation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_state, events, losses, tiny, write_text

from teratron.checkpoint.open import open_model
from teratron.config import UserError
from teratron.train import Trainer
from teratron.train.engine import Engine

XLNET = {"model__family": "xlnet", "model__position": "transformer_xl", "model__seq_length": 16, "model__recurrence": 8}
RUNS: dict[str, dict[str, Any]] = {
    "xlnet": {**XLNET, "objective__name": "permuted", "objective__mask_rate": 0.3, "model__attention_dropout": 0.2},
    "transformer-xl": XLNET,
    "heads ahead": {"model__predict_tokens": 3},
}


class Struck(Exception):
    """The end of a process."""


@pytest.fixture(params=RUNS)
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that was struck in its fifth step and went on, and one that was not."""
    config = tiny(write_text(tmp_path / "text.txt"), **RUNS[request.param])
    Trainer(config, tmp_path / "whole", device="cpu", echo=False).train()
    whole = Engine.step

    def strike(engine: Engine, *inputs: Any, step: int, **more: Any) -> Any:
        if step == 5:
            raise Struck
        return whole(engine, *inputs, step=step, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", strike)
        with pytest.raises(Struck):
            Trainer(config, tmp_path / "struck", device="cpu", echo=False).train()
    Trainer(config, tmp_path / "struck", device="cpu", echo=False).train()
    return tmp_path


def test_a_struck_run_ends_as_the_whole_one(runs: Path) -> None:
    assert losses(runs / "struck") == losses(runs / "whole")
    assert_same_state(runs / "struck", runs / "whole")
    evaluations = [event["loss"] for event in events(runs / "whole", "eval")]
    assert len(set(evaluations)) == len(evaluations) == 2
    assert evaluations[-1] == [event["loss"] for event in events(runs / "struck", "eval")][-1]


def test_only_decoders_continue_text(runs: Path) -> None:
    config = (runs / "whole" / "config.toml").read_text("utf-8")
    if 'family = "gpt"' in config:
        assert open_model(runs / "whole").model.config.predict_tokens == 3
    else:
        with pytest.raises(UserError, match=r"model\.family = xlnet does not continue text: choose a run or checkpoint of model\.family"):
            open_model(runs / "whole")
