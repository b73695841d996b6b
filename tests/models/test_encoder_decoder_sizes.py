"""The presets of encoder-decoders have the published numbers of parameters; what an encoder-decoder's token costs."""

from __future__ import annotations

import dataclasses

import pytest

from teratron.config import Config, ModelConfig
from teratron.models import build_model, flops_per_token, parameter_count

PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
}
"""Parameters of the models' files, a shared table counted once."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_parameters(name: str) -> None:
    assert parameter_count(build_model(Config.preset(name).model, device="meta")) == PUBLISHED[name]


def test_ul2_has_20_billion() -> None:
    assert parameter_count(build_model(Config.preset("ul2-20b").model, device="meta")) == pytest.approx(19.5e9, rel=0.005)


def test_a_decoders_operations_count_for_what_is_written() -> None:
    """Beside the written-out sum of the products of both stacks, with a quarter as many tokens written as read."""
    config = ModelConfig(family="encoder_decoder", layers=3, hidden=64, heads=4, ffn=96, seq_length=128, vocab_size=500, position="rope")
    read, written, hidden, ffn = 128, 32, 64, 96
    block = 4 * hidden**2 + 2 * hidden * ffn
    products = read * (3 * block + 3 * 2 * hidden**2) + written * (3 * block + 3 * 2 * hidden**2 + 500 * hidden)
    attended = read * read + written * written / 2 + written * read
    expected = 6 * products + 12 * 3 * hidden * attended
    for tied in (True, False):
        model = build_model(dataclasses.replace(config, tie_embeddings=tied, bias=False), device="meta")
        assert flops_per_token(model, read, written / read) * read == pytest.approx(expected, rel=1e-9)
