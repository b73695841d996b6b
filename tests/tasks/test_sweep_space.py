"""What a sweep tries: grids, spreads, rounds of halving, and what is refused before anything is trained."""

from __future__ import annotations

import itertools
import math

import pytest

from teratron.config import Config, UserError
from teratron.tasks.sweep_space import check_points, grid_points, parse_dimension, random_points, rungs


def test_a_grid_is_every_combination_of_lists_and_of_even_points() -> None:
    dimensions = [parse_dimension(text) for text in ("optim.lr=1e-4..1e-2:log:3", "optim.name=adamw,lion")]
    expected = [{"optim.lr": lr, "optim.name": name} for lr in ("0.0001", "0.001", "0.01") for name in ("adamw", "lion")]
    assert grid_points(dimensions) == expected


def test_a_linear_range_of_a_whole_number_gives_whole_numbers() -> None:
    assert parse_dimension("train.global_batch=4..16:4").grid() == ["4", "8", "12", "16"]
    assert parse_dimension("optim.beta2=0.9..1:3").grid() == ["0.9", "0.95", "1"]


@pytest.mark.parametrize("count", [3, 8, 20])
def test_a_spread_meets_every_equal_share_of_each_key_once(count: int) -> None:
    dimensions = [parse_dimension("optim.lr=1e-5..1e-1:log"), parse_dimension("optim.beta1=0.5..0.9")]
    points = random_points(dimensions, count, seed=3)
    shares = [sorted(int(count * (math.log10(float(point["optim.lr"])) + 5) / 4) for point in points)]
    shares.append(sorted(int(count * (float(point["optim.beta1"]) - 0.5) / 0.4) for point in points))
    assert shares == [list(range(count))] * 2
    assert points == random_points(dimensions, count, seed=3), "a function of the seed"
    assert points != random_points(dimensions, count, seed=4)


def test_a_spread_uses_the_values_of_a_list_equally_often_and_no_point_twice() -> None:
    names = [point["optim.name"] for point in random_points([parse_dimension("optim.name=adamw,lion")], 8, 0)]
    assert sorted(names) == ["adamw", "lion"]
    mixed = [parse_dimension("optim.name=adamw,lion"), parse_dimension("optim.lr=1e-4..1e-2:log")]
    assert sorted(point["optim.name"] for point in random_points(mixed, 8, 0)) == ["adamw"] * 4 + ["lion"] * 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim.lrr=1,2", "unknown key 'optim.lrr' (did you mean 'optim.lr'?)"),
        ("optim.lr", "expected KEY=A,B,C or KEY=LOW..HIGH"),
        ("optim.lr=", "expected KEY=A,B,C or KEY=LOW..HIGH"),
        ("optim.lr=1,,2", "expected KEY=A,B,C or KEY=LOW..HIGH"),
        ("optim.lr=1,1", "a value stands there twice"),
        ("optim.lr=a..b", "expected a range of numbers"),
        ("optim.lr=1..2:5:log", "expected a range of numbers"),
        ("optim.lr=2..1", "the lower number first"),
        ("optim.lr=nan..1", "the lower number first"),
        ("optim.lr=0..1:log", "a logarithmic range lies above 0"),
    ],
)
def test_what_is_no_key_or_range_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_dimension(text)
    assert sentence in str(refused.value)


def test_a_grid_over_a_range_needs_a_number_of_points() -> None:
    with pytest.raises(UserError, match="add :N"):
        parse_dimension("optim.lr=1e-4..1e-2:log").grid()


def test_every_point_is_checked_and_the_wrong_one_is_named() -> None:
    points = [{"model.heads": "4"}, {"model.heads": "5"}]
    with pytest.raises(UserError, match=r"trial 1 of 2 \(model.heads = 5\): model.hidden = 768 is not divisible"):
        check_points(Config(), points)


@pytest.mark.parametrize("eta", [2, 3, 4])
@pytest.mark.parametrize("trials", [1, 2, 8, 9, 27, 100])
def test_rounds_narrow_to_one_trial_of_all_steps(trials: int, eta: int) -> None:
    rounds = rungs(trials, 10_000, eta)
    counts, steps = zip(*rounds, strict=True)
    assert counts[0] == trials
    assert rounds[-1] == (1, 10_000)
    assert all(after == math.ceil(before / eta) for before, after in itertools.pairwise(counts))
    assert all(abs(after - before * eta) < eta for before, after in itertools.pairwise(steps))


def test_too_few_steps_for_the_rounds_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.steps = 8 are too few for 27 trials in 4 rounds.*at least 27"):
        rungs(27, 8, 3)
