"""Parts cover the parameters, count as the papers do, and do not depend on which units a model holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from teratron.config import Config, ModelConfig, UserError
from teratron.models import GPT, build_model, flops_per_token, initialise, load_parts, parameter_count, parts_of

GPT2 = ModelConfig(layers=3, hidden=32, heads=4, seq_length=16, vocab_size=100)
LLAMA = ModelConfig(
    layers=3, hidden=32, heads=4, kv_heads=2, ffn=48, seq_length=16, vocab_size=100, norm="rmsnorm", activation="swiglu",
    position="rope", tie_embeddings=False, bias=False, qk_norm=True,
)  # fmt: skip
STYLES = pytest.mark.parametrize("config", [GPT2, LLAMA, dataclasses.replace(LLAMA, bias=True, tie_embeddings=True)])


def initial_parts(model: GPT, seed: int = 3) -> dict[str, torch.Tensor]:
    initialise(model, seed)
    parameters = dict(model.named_parameters())
    return {part.name: part.of(parameters[part.parameter]).detach() for part in parts_of(model)}


@STYLES
def test_parts_cover_every_element_once_except_padding(config: ModelConfig) -> None:
    model = build_model(config)
    parameters = dict(model.named_parameters())
    covered = {name: torch.zeros(parameter.shape, dtype=torch.int64) for name, parameter in parameters.items()}
    for part in parts_of(model):
        assert part.of(parameters[part.parameter]).shape == part.shape
        part.of(covered[part.parameter]).add_(1)
    for name, counts in covered.items():
        padded = name in ("embedding.tokens.weight", "head.output.weight")
        rows = config.vocab_size if padded else counts.shape[0]
        assert (counts[:rows] == 1).all(), name
        assert (counts[rows:] == 0).all(), name
    assert len({part.name for part in parts_of(model)}) == len(parts_of(model))


PAPERS = [
    ("megatron-355m", 355e6, 5e-3),
    ("megatron-2.5b", 2.5e9, 1e-2),
    ("megatron-8.3b", 8.3e9, 5e-3),
    ("gpt3-175b", 174.6e9, 1e-3),
    ("gpt-1t", 1008e9, 1e-3),
    ("gpt2-124m", 124_439_808, 0),
    ("gpt2-1.5b", 1_557_611_200, 0),
    ("llama3-8b", 8_030_261_248, 0),
    ("llama3-70b", 70_553_706_496, 0),
]
"""Counts of Shoeybi et al. 2019 (table 1), Narayanan et al. 2021 (table 1), and of the released weights, and what their rounding allows."""


@pytest.mark.parametrize(("preset", "count", "tolerance"), PAPERS)
def test_parameter_counts_of_presets_are_the_papers(preset: str, count: float, tolerance: float) -> None:
    model = build_model(Config.preset(preset).model, device="meta")
    assert abs(parameter_count(model) - count) <= tolerance * count


@pytest.mark.parametrize("preset", ["gpt3-175b", "gpt-1t"])
def test_flops_are_narayanans_without_recomputation(preset: str) -> None:
    """Their equation 3 with 72 for 96 (no recomputation), and s / 12 h for s / 6 h: only the causal half is counted."""
    config = Config.preset(preset).model
    layers, width, length, vocab = config.layers, config.hidden, config.seq_length, config.vocab_size
    expected = 72 * layers * width**2 * (1 + length / (12 * width) + vocab / (12 * layers * width))
    assert flops_per_token(build_model(config, device="meta"), length) == pytest.approx(expected, rel=1e-12)


def test_flops_of_attention_are_those_of_the_keys_that_are_seen() -> None:
    counts = [
        flops_per_token(build_model(dataclasses.replace(GPT2, **keys), device="meta"), 16)
        for keys in ({}, {"window": 1}, {"window": 1, "global_every": 3}, {"window": 4})
    ]
    pairs = [3 * 16 / 2, 3 * 1, 2 * 1 + 16 / 2, 3 * (1 + 2 + 3 + 13 * 4) / 16]  # over three layers
    for count, seen in zip(counts, pairs, strict=True):
        assert count - counts[0] == pytest.approx(12 * 32 * (seen - pairs[0]), rel=1e-12)


@STYLES
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_two_ranges_of_units_hold_the_whole_and_chain_to_it(config: ModelConfig, cut: int) -> None:
    whole = build_model(config, dtype=torch.float64)
    ranges = [range(cut), range(cut, config.layers + 2)]
    stages = [build_model(config, units, dtype=torch.float64) for units in ranges]
    expected, found = initial_parts(whole), [initial_parts(stage) for stage in stages]
    assert set(expected) == {name for parts in found for name in parts}
    for parts in found:
        for name, values in parts.items():
            assert torch.equal(values, expected[name]), name
    tokens = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    state = {"tokens": tokens, "positions": torch.arange(16).expand(2, 16)}
    sent = stages[0](state)
    assert sent.keys() == {"hidden"}
    chained = stages[1](sent | {"positions": state["positions"]})["hidden"]
    assert torch.equal(chained, whole(state)["hidden"])
    assert whole.head is not None
    assert stages[1].head is not None
    assert torch.equal(stages[1].head.output(chained), whole.head.output(chained))


def test_a_tied_head_apart_from_its_embedding_has_the_embeddings_name() -> None:
    (part,) = (part for part in parts_of(build_model(GPT2, range(4, 5))) if "norm" not in part.name)
    assert (part.name, part.parameter) == ("embedding.tokens.weight", "head.output.weight")


@STYLES
def test_load_parts_copies_casts_and_clears_the_padding(config: ModelConfig) -> None:
    source = build_model(config)
    parts = initial_parts(source)
    target = build_model(config, dtype=torch.bfloat16)
    for parameter in target.parameters():
        parameter.data.fill_(float("nan"))
    load_parts(target, parts)
    for (name, expected), found in zip(source.named_parameters(), target.parameters(), strict=True):
        assert torch.equal(expected.bfloat16(), found), name


def test_load_parts_refuses_other_parts_by_name_and_changes_nothing() -> None:
    model = build_model(GPT2)
    parts = initial_parts(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    name = "blocks.1.attention.k.weight"
    missing = {key: value for key, value in parts.items() if key != name}
    with pytest.raises(UserError, match=r"^weights missing: blocks\.1\.attention\.k\.weight: "):
        load_parts(model, missing)
    with pytest.raises(UserError, match=r"^weights missing: .* and \d+ more: "):
        load_parts(model, {})
    with pytest.raises(UserError, match=r"^weights not in this model: blocks\.9\.extra: "):
        load_parts(model, {**parts, "blocks.9.extra": parts[name]})
    with pytest.raises(UserError, match=r"^blocks\.1\.attention\.k\.weight: found shape \[31, 32\], expected \[32, 32\]"):
        load_parts(model, {**parts, name: parts[name][:31]})
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key
