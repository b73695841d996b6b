"""The sampler: each filter against its definition, frequencies against probabilities, and numbers that follow from the seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from teratron.config import UserError
from teratron.generate.sampler import Sampling, choose, uniform

LOGITS = torch.tensor([1.0, 3.0, -2.0, 3.0, 0.5, 2.0, -math.inf, 0.0], dtype=torch.float64)
GRID = 4000


def expected(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities by the definition, one token at a time in order of likelihood."""
    scaled = logits / sampling.temperature
    order = sorted(range(len(logits)), key=lambda token: (-scaled[token].item(), token))[: sampling.top_k or None]
    probabilities = dict(zip(order, scaled[order].softmax(-1).tolist(), strict=True))
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= sampling.top_p - 1e-9:
            break
        kept.append(token)
        mass += probabilities[token]
    result = torch.zeros(len(logits), dtype=torch.float64)
    for token in kept:
        result[token] = probabilities[token] / mass
    return result


def frequencies(logits: Tensor, sampling: Sampling, numbers: list[float]) -> Tensor:
    chosen = choose(logits.expand(len(numbers), -1), sampling, numbers)
    return chosen.bincount(minlength=len(logits)) / len(numbers)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(3.0),
        Sampling(top_k=1),
        Sampling(top_k=3),
        Sampling(top_k=100),
        Sampling(top_p=0.5),
        Sampling(top_p=0.9),
        Sampling(top_p=1e-9),
        Sampling(0.8, top_k=4, top_p=0.8),
    ],
    ids=str,
)
def test_an_even_grid_of_numbers_gives_the_probabilities(sampling: Sampling) -> None:
    numbers = [(n + 0.5) / GRID for n in range(GRID)]
    torch.testing.assert_close(frequencies(LOGITS, sampling, numbers), expected(LOGITS, sampling).float(), rtol=0, atol=1.01 / GRID)


def test_seeds_give_the_probabilities() -> None:
    sampling = Sampling(1.3, top_k=6, top_p=0.95)
    wanted = expected(LOGITS, sampling)
    found = frequencies(LOGITS, sampling, [uniform(seed, 5) for seed in range(GRID)])
    assert found[wanted == 0].sum() == 0
    live = wanted > 0
    chi_squared = GRID * ((found[live] - wanted[live]) ** 2 / wanted[live]).sum().item()
    assert chi_squared < 3 * live.sum().item() + 10


def test_equal_tokens_lower_ids_first() -> None:
    equal = torch.zeros(1, 6)
    numbers = [(n + 0.5) / 60 for n in range(60)]
    assert set(choose(equal.expand(60, -1), Sampling(top_k=2), numbers).tolist()) == {0, 1}
    assert set(choose(equal.expand(60, -1), Sampling(top_p=0.5), numbers).tolist()) == {0, 1, 2}
    assert choose(equal, Sampling(temperature=0), [0.9]).tolist() == [0]


@pytest.mark.parametrize(("p", "kept"), [(0.5, 1), (0.5000001, 1), (0.50001, 2), (0.75, 2), (0.8, 3), (0.875, 3), (0.88, 4), (1e-300, 1)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: int) -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    numbers = [(n + 0.5) / 64 for n in range(64)]
    assert len(choose(logits.expand(64, -1), Sampling(top_p=p), numbers).unique()) == kept


@pytest.mark.parametrize("width", [0.0, 0.3, 2.0], ids=["equal", "flat", "peaked"])
def test_top_p_of_a_large_vocabulary(width: float) -> None:
    logits = width * torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampling = Sampling(top_p=0.7)
    numbers = [(n + 0.5) / GRID for n in range(GRID)]
    torch.testing.assert_close(frequencies(logits, sampling, numbers), expected(logits, sampling).float(), rtol=0, atol=1.01 / GRID)


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_never_pick_the_impossible(number: float) -> None:
    logits = torch.full((500, 40), -math.inf)
    logits[:, 10:30] = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)) * 3
    chosen = choose(logits, Sampling(), [number] * 500)
    assert chosen.tolist() == [10 if number == 0 else 29] * 500


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert choose(logits, Sampling(1e-300), [0.99] * 50).equal(choose(logits, Sampling(0), [0.99] * 50))


def test_numbers_depend_on_seed_and_place_and_are_uniform() -> None:
    numbers = torch.tensor([[uniform(seed, place) for place in range(64)] for seed in range(64)], dtype=torch.float64)
    assert len(numbers.unique()) == 64 * 64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for axis in (0, 1):
        assert (numbers.mean(axis) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 64)
    assert uniform(3, 4) == uniform(3, 4)


def test_half_precision_logits_are_summed_accurately() -> None:
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    assert choose(logits, Sampling(), [0.75]).tolist() == [37_500]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="not finite"):
            choose(torch.tensor([[0.0, 1.0], [bad, 0.0]]), Sampling(temperature), [0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"seed": -3}, "seed = -3"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Sampling(**values)
    assert "\n" not in str(error.value)
