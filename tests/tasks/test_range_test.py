"""The range test: its readings of known curves, and a real run on one and on two ranks."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from tiny import KEYS, events, write_text

from teratron.cli.main import main
from teratron.config import Config, OptimConfig, UserError
from teratron.optim import learning_rate
from teratron.tasks.range_test import find, range_config, range_test, tell

RATES = [10 ** (-6 + 6 * i / 199) for i in range(200)]


def curve(fall: float, rise: float) -> list[float]:
    """A loss that falls from 4 to 2, fastest at one rate, and rises steeply beyond another."""
    return [4 - 2 / (1 + (fall / rate) ** 2) + (rate / rise) ** 2 for rate in RATES]


@pytest.mark.parametrize(("fall", "rise"), [(1e-4, 1e-2), (1e-3, 3e-1), (1e-5, 1e-3)])
def test_steepest_descent_and_divergence_of_a_known_curve(fall: float, rise: float) -> None:
    found = find(RATES, curve(fall, rise), 200)
    assert found.steepest == pytest.approx(fall, rel=0.1), "of a logistic curve its middle"
    assert found.diverged == pytest.approx(rise, rel=0.35), "where it has lost half of what it gained: within the smoothing"
    assert found.suggested == pytest.approx(math.sqrt(found.steepest * found.diverged / 10))


def test_what_has_diverged_stays_so_whatever_follows() -> None:
    """Or a test that was stopped for it would be found not to have ended."""
    noise = random.Random(5)
    losses = [loss + noise.gauss(0, 0.3) for loss in curve(1e-4, 1e-1)]
    found = [find(RATES[:count], losses[:count], 200).diverged for count in range(1, 201)]
    first = next(count for count, diverged in enumerate(found) if math.isfinite(diverged))
    assert found[first:] == [found[first]] * (200 - first)


def test_a_loss_that_is_no_number_is_divergence() -> None:
    losses = [*curve(1e-4, 1e9)[:150], math.nan]
    found = find(RATES[:151], losses, 200)
    assert found.diverged == RATES[150]
    assert find(RATES[:1], [math.nan], 200).diverged == RATES[0]


def test_a_curve_that_never_diverges_says_so() -> None:
    found = find(RATES, curve(1e-4, 1e9), 200)
    assert math.isnan(found.diverged)
    assert "it does not diverge: raise --to" in tell(found)


def test_a_flat_or_empty_curve_finds_nothing() -> None:
    for rates, losses in (([], []), (RATES, [4.0] * 200)):
        found = find(rates, losses, 200)
        assert math.isnan(found.steepest)
        assert math.isnan(found.suggested)


def test_the_schedule_rises_by_one_factor_from_end_to_end() -> None:
    config = range_config(Config(), 1e-6, 1e-2, 5)
    assert [learning_rate(config, step) for step in range(1, 6)] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])


def test_a_range_is_refused_where_it_has_no_beginning() -> None:
    with pytest.raises(UserError, match=r"set optim\.min_lr above 0"):
        OptimConfig(schedule="range")
    with pytest.raises(UserError, match="without a warm-up"):
        OptimConfig(schedule="range", min_lr=1e-6, warmup_steps=5)
    for low, high in ((0.0, 1.0), (1.0, 1e-3)):
        with pytest.raises(UserError, match="expected two learning rates above 0, the lower one first"):
            range_config(Config(), low, high, 100)
    with pytest.raises(UserError, match="--to inf: expected two learning rates"):
        range_config(Config(), 1e-6, math.inf, 100)
    with pytest.raises(UserError, match="--steps 1: expected at least 2"):
        range_config(Config(), 1e-6, 1.0, 1)
    with pytest.raises(UserError, match=r"optim\.name = schedule_free"):
        range_config(Config(optim=OptimConfig(name="schedule_free", schedule="constant")), 1e-6, 1.0, 100)


def test_the_schedule_of_the_config_gives_way() -> None:
    own = OptimConfig(schedule="wsd", decay_shape="sqrt", decay_steps=10, warmup_steps=5)
    assert range_config(Config(optim=own), 1e-6, 1.0, 100).optim.schedule == "range"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """Its old findings are not those of what is asked for now."""
    config = range_config(Config(), 1e-6, 1.0, 100)
    (tmp_path / "range.toml").write_text(config.to_toml())
    for other, said in (
        (range_config(Config(), 1e-6, 2.0, 100), r"holds a range test with --to = 1\.0, now 2\.0"),
        (range_config(Config(), 1e-6, 1.0, 99), "with --steps = 100, now 99"),
        (range_config(Config(optim=OptimConfig(name="lion")), 1e-6, 1.0, 100), r"with optim\.name = 'adamw', now 'lion'"),
    ):
        with pytest.raises(UserError, match=said):
            range_test(other, tmp_path, 1, "cpu", print)
    (tmp_path / "config.toml").write_text(config.to_toml())
    with pytest.raises(UserError, match="holds a run: choose another folder for the test"):
        range_test(config, tmp_path, 1, "cpu", print)


def test_keys_that_the_test_sets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["range-test", "--run", str(tmp_path / "test"), "--optim.lr", "1"]) == 2
    assert "--optim.lr: the test sets it itself" in capsys.readouterr().err
    assert not (tmp_path / "test").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--nproc=2", "--parallel.tensor=2"]])
def test_a_run_stops_when_it_diverges_and_the_same_command_reads_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, layout: list[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = write_text(tmp_path / "text.txt")
    given = KEYS | {"data.text": text, "optim.eps": 1e-6, "model.hidden": 32}
    keys = [f"--{name}={str(value).lower()}" for name, value in given.items() if name not in ("optim.lr", "train.steps")]
    command = ["range-test", *keys, *layout, "--run", str(tmp_path / "test"), "--from=1e-4", "--to=1e4", "--steps=400", "--device=cpu"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "it diverges at" in told
    made = events(tmp_path / "test" / "run", "step")
    assert len(made) < 400, "it was stopped"
    assert [event["lr"] for event in made[:2]] == pytest.approx([1e-4, 1e-4 * 1e8 ** (1 / 399)])
    assert "<svg" in (tmp_path / "test" / "range.html").read_text()
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == told.splitlines()[-4:]
    assert len(events(tmp_path / "test" / "run", "step")) == len(made), "and nothing is trained again"
