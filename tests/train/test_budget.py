"""A memory budget takes the cheapest recomputation that fits, says so, and changes no number."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import losses, tiny, write_text

from teratron.config import Config, UserError
from teratron.train.budget import GIB, LADDER, needs, within_budget
from teratron.train.trainer import Trainer

SHAPE = {"model.layers": 8, "model.hidden": 32, "model.heads": 2, "model.seq_length": 64, "model.vocab_size": 64, "train.global_batch": 4}


def rungs(config: Config) -> list[int]:
    """What a step takes at each rung of the ladder, in bytes."""
    return [needs(config.override({"train.recompute": mode, "train.recompute_every": every}), 1) for mode, every in LADDER]


def test_the_first_rung_that_fits_is_taken() -> None:
    config = Config().override(SHAPE)
    needed = rungs(config)
    assert needed[-1] < needed[-2] < needed[2] < needed[0]
    for budget in needed:
        chosen, said = within_budget(config.override({"train.memory_budget": budget / GIB}), 1)
        right = LADDER[next(at for at, size in enumerate(needed) if size <= budget)]
        assert (chosen.train.recompute, chosen.train.recompute_every) == right
        assert f"memory budget {budget / GIB:g} GiB" in said


def test_without_a_budget_nothing_is_asked() -> None:
    config = Config().override(SHAPE)
    assert within_budget(config, 1) == (config, "")


def test_what_never_fits_is_refused_with_what_it_takes() -> None:
    config = Config().override(SHAPE)
    with pytest.raises(UserError, match=r"train.memory_budget = 1e-06: a step takes .* lower train.micro_batch"):
        within_budget(config.override({"train.memory_budget": 1e-6}), 1)


def test_a_run_within_a_budget_has_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    config = tiny(text, **{"model.layers": 4, "train.precision": "fp64"})
    Trainer(config, tmp_path / "plain").train()
    data = Trainer(config, tmp_path / "asked").config  # with the vocabulary of the data
    budget = (rungs(data)[-1] + rungs(data)[-2]) / 2 / GIB
    Trainer(config.override({"train.memory_budget": budget}), tmp_path / "within").train()
    assert losses(tmp_path / "within") == losses(tmp_path / "plain")
    assert "all blocks are made again" in capsys.readouterr().out
