"""Random numbers: masks are fair, independent and shardable; initial values do not depend on who asks for which rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from teratron.config import ModelConfig
from teratron.models import build_model, initialise, parts_of
from teratron.models.random import ROW_BLOCK, feature_keys, keep_mask, mask_keys, normal_box, seed_of

SAMPLES, LENGTH, FEATURES = 8, 128, 256


def mask(seed: int = 1, step: int = 7, site: str = "blocks.0.ffn.dropout", p: float = 0.1, first: int = 0) -> Tensor:
    """A mask of [SAMPLES, LENGTH, FEATURES]; `first` is the first sample's global index."""
    positions = torch.arange(LENGTH).expand(SAMPLES, LENGTH)
    keys = mask_keys(seed, step, torch.arange(first, first + SAMPLES), positions, torch.zeros_like(positions))
    return keep_mask(keys, feature_keys(seed_of(site), FEATURES, torch.device("cpu")), p)


def correlation(a: Tensor, b: Tensor, p: float) -> float:
    """Correlation of two masks in units of its standard deviation under independence."""
    product = (a.double() - (1 - p)) * (b.double() - (1 - p))
    return float(product.mean() / (p * (1 - p)) * math.sqrt(product.numel()))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_of_the_whole_of_each_token_and_of_each_feature(p: float) -> None:
    kept = mask(p=p).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 4 * sigma / math.sqrt(kept.numel())
    for over in ((0, 1), (2,), (0, 2), (1, 2)):
        rates = kept.mean(over)
        count = kept.numel() // rates.numel()
        assert (rates - (1 - p)).abs().max() < 5 * sigma / math.sqrt(count)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_correlation_along_any_coordinate(p: float) -> None:
    base = mask(p=p)
    for dim in range(3):
        for distance in (1, 2, 5):
            size = base.shape[dim] - distance
            shifted = correlation(base.narrow(dim, 0, size), base.narrow(dim, distance, size), p)
            assert abs(shifted) < 4, (dim, distance)
    others = [mask(step=8, p=p), mask(seed=2, p=p), mask(site="blocks.1.ffn.dropout", p=p), mask(first=SAMPLES, p=p)]
    for other in others:
        assert abs(correlation(base, other, p)) < 4


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_tokens_and_no_two_features_share_a_mask(p: float) -> None:
    centred = (mask(p=p).flatten(0, 1).double() - (1 - p)) / math.sqrt(p * (1 - p))
    for matrix in (centred, centred.t()):
        others = (matrix @ matrix.t() / math.sqrt(matrix.shape[1])).fill_diagonal_(0)
        assert others.abs().max() < 7  # half a million pairs, the skewed tail of p = 0.1 included


def test_token_keys_hardly_collide() -> None:
    samples, length = 256, 1024
    positions = torch.arange(length).expand(samples, length)
    keys = mask_keys(3, 1, torch.arange(samples) + 10**9, positions, torch.zeros_like(positions))
    count = samples * length
    assert count - keys.unique().numel() < 4 * count**2 / 2**33  # four times what random 32-bit numbers do


def test_segments_separate_documents_with_the_same_positions() -> None:
    positions = torch.arange(64).repeat(2)[None]
    segments = torch.arange(2).repeat_interleave(64)[None]
    first, second = mask_keys(1, 1, torch.tensor([0]), positions, segments)[0].chunk(2)
    assert not (first == second).any()


def test_a_slice_of_coordinates_gives_that_slice_of_the_mask() -> None:
    samples, positions = torch.arange(100, 106), torch.arange(40).expand(6, 40)
    segments = positions // 15
    site, cpu = seed_of("embedding.dropout"), torch.device("cpu")
    features = feature_keys(site, 96, cpu)
    whole = keep_mask(mask_keys(1, 2, samples, positions, segments), features, 0.3)
    keys = mask_keys(1, 2, samples[2:5], positions[2:5, 10:31], segments[2:5, 10:31])
    assert torch.equal(keep_mask(keys, features[32:64], 0.3), whole[2:5, 10:31, 32:64])
    assert torch.equal(feature_keys(site, 40, cpu), features[:40])


def test_probability_zero_keeps_everything() -> None:
    assert mask(p=0.0).all()


SHAPE = (5 * ROW_BLOCK + 17, 24)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 64), (63, 65), (10, 200), (130, 131), (300, 337), (64, 128), (0, 337), (90, 90)])
def test_any_region_is_that_slice_of_the_whole(start: int, stop: int) -> None:
    whole = normal_box(5, "a.weight", SHAPE, (slice(0, SHAPE[0]), slice(0, SHAPE[1])))
    for columns in (slice(0, SHAPE[1]), slice(3, 4), slice(9, SHAPE[1])):
        assert torch.equal(normal_box(5, "a.weight", SHAPE, (slice(start, stop), columns)), whole[start:stop, columns])


def test_initial_values_are_standard_normal_and_differ_by_seed_name_shape_and_block() -> None:
    everything = (slice(0, 4096), slice(0, 64))
    values = normal_box(5, "a.weight", (4096, 64), everything).double()
    count = values.numel()
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.std() - 1) < 4 / math.sqrt(2 * count)
    assert abs((values.abs() < 1).double().mean() - math.erf(math.sqrt(0.5))) < 4 * 0.47 / math.sqrt(count)
    variants = [(6, "a.weight", (4096, 64)), (5, "b.weight", (4096, 64)), (5, "a.weight", (8192, 64))]
    others = [normal_box(*variant, everything) for variant in variants] + [values.roll(ROW_BLOCK, 0)]
    for other in others:
        assert abs((values * other).mean()) < 4 / math.sqrt(count)


def test_seed_of_is_stable_and_keeps_its_parts_apart() -> None:
    assert seed_of("site", "embedding.dropout") == 8329138552725835209  # old checkpoints and runs depend on it
    assert seed_of("a", "b") != seed_of("ab") != seed_of("a b")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_precision_starts_from_the_same_numbers(dtype: torch.dtype) -> None:
    config = ModelConfig(layers=1, hidden=32, heads=2, seq_length=8, vocab_size=70)
    exact, other = build_model(config), build_model(config, dtype=dtype)
    initialise(exact, 11)
    initialise(other, 11)
    for (name, expected), found in zip(exact.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(expected.to(dtype), found), name


def test_initial_standard_deviations_are_megatrons() -> None:
    config = ModelConfig(layers=8, hidden=128, heads=4, seq_length=64, vocab_size=500, init_std=0.03)
    model = build_model(config)
    initialise(model, 1)
    parameters = dict(model.named_parameters())
    for part in parts_of(model):
        values = part.of(parameters[part.parameter])
        if values.dim() == 1:
            assert (values == (1.0 if "norm.weight" in part.name else 0.0)).all(), part.name
        else:
            scaled = part.name.endswith(("attention.output.weight", "ffn.down.weight"))
            expected = 0.03 / math.sqrt(2 * 8) if scaled else 0.03
            assert abs(values.std() / expected - 1) < 5 / math.sqrt(2 * values.numel()), part.name
