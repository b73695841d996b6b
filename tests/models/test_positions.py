"""Positions: rotary scalings as transformers computes them, waves, ALiBi on every path of attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teratron.config import ModelConfig, UserError
from teratron.models import GPT, build_model, initialise
from teratron.models.attention import AttentionCore
from teratron.models.patterns import Pattern
from teratron.models.positions import Waves, frequencies, rotary, rotate, slopes
from teratron.models.sight import Sight

torch.set_num_threads(1)

BASE = ModelConfig(layers=2, hidden=32, heads=4, seq_length=24, vocab_size=17, vocab_multiple=1, init_std=0.3, position="rope")
ROTARY = dataclasses.replace(BASE, head_dim=64, rope_theta=5e5, max_positions=131072)
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_factor": 4.0}, {"factor": 4.0}),
    "yarn": (
        {"rope_factor": 40.0, "rope_original": 4096},
        {"factor": 40.0, "original_max_position_embeddings": 4096},
    ),
    "yarn-deepseek": (
        {"rope_factor": 40.0, "rope_original": 4096, "rope_fast": 16.0, "rope_slow": 2.0, "rope_sharpness": 1.5},
        {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5},
    ),
    "llama3": (
        {"rope_factor": 8.0, "rope_original": 8192},
        {"factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama3-other": (
        {"rope_factor": 32.0, "rope_original": 4096, "rope_slow": 2.0, "rope_fast": 8.0},
        {"factor": 32.0, "original_max_position_embeddings": 4096, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
    ),
}


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_angles_are_those_of_transformers(name: str, share: float) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is the oracle: pip install transformers")
    transformers = pytest.importorskip("transformers")
    ours, theirs = SCALINGS[name]
    kind = name.partition("-")[0]
    parameters = {"rope_type": kind, "rope_theta": 5e5, "partial_rotary_factor": share, **theirs}
    expected, factor = utils.ROPE_INIT_FUNCTIONS[kind](transformers.LlamaConfig(head_dim=64, rope_parameters=parameters), "cpu")
    config = dataclasses.replace(ROTARY, rope_scaling=kind, rope_share=share, **ours)
    torch.testing.assert_close(frequencies(config, torch.float32), expected, rtol=1e-6, atol=0)
    found = rotary(config, torch.tensor([[0, 1, 100]]), torch.float32)
    assert found is not None
    torch.testing.assert_close(found[0][0, 0, :2], (torch.arange(2)[:, None] * expected).cos() * factor, rtol=1e-6, atol=1e-6)


def test_the_base_of_ntk_is_that_of_transformers_at_one_length() -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is the oracle: pip install transformers")
    transformers = pytest.importorskip("transformers")
    parameters = {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0}
    theirs = transformers.LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=parameters)
    expected, _ = utils.ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=4096 * 7 // 4)  # where its factor is also 4
    config = dataclasses.replace(ROTARY, rope_scaling="ntk", rope_factor=4.0)
    torch.testing.assert_close(frequencies(config, torch.float32), expected, rtol=1e-6, atol=0)


def test_a_share_of_features_is_rotated() -> None:
    config = dataclasses.replace(ROTARY, rope_share=0.25)
    angles = rotary(config, torch.arange(5)[None], torch.float64)
    assert angles is not None
    x = torch.randn(1, 2, 5, 64, dtype=torch.float64)
    turned = rotate(x, *angles)
    assert torch.equal(turned[..., 16:], x[..., 16:])
    torch.testing.assert_close(turned[..., :16], rotate(x[..., :16], *angles))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_waves_are_the_papers() -> None:
    found = Waves(6)(torch.tensor([[0, 3, 700]]), torch.float64)
    for row, position in enumerate((0, 3, 700)):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            assert found[0, row, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert found[0, row, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="transformers is the oracle: pip install transformers")
    expected = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(slopes(heads)), expected)


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, rates: list[float], cap: float) -> Tensor:
    """Attention with every score written out."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = cap * (scores / cap).tanh() if cap else scores
    places = torch.arange(q.shape[2])
    scores = scores - torch.tensor(rates, dtype=q.dtype)[:, None, None] * (places[:, None] - places)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("falls", [False, True])
def test_capped_and_falling_scores_on_every_path(window: int, cap: float, falls: bool) -> None:
    """The fused kernel, plain operations, and tiles: outputs and gradients."""
    draw = torch.Generator().manual_seed(3)
    length, heads = 70, 6
    q, k, v = (torch.randn(2, n, length, 8, generator=draw, dtype=torch.float64, requires_grad=True) for n in (heads, 3, 3))
    core = AttentionCore(0.0, "here", cap, falls)
    segments = (torch.arange(length) > 30).long().expand(2, length)
    sight = Sight(True, Pattern(window), segments=segments)
    assert bool(sight.tiles(length, length, 128)) == bool(window)
    seen = sight.mask(length, length, q.device)
    assert seen is not None
    expected = by_hand(q, k, v, seen, slopes(heads) if falls else [0.0] * heads, cap)
    direction = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    slopes_of = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for found in (core(q, k, v, sight, None), core.plain(q, k, v, sight, None)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad((found * direction).sum(), (q, k, v)), slopes_of, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "alibi", "kv_heads": 2, "attention_cap": 2.0},
        {"position": "sinusoidal", "scale_embeddings": True, "output_cap": 3.0},
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 16, "rope_share": 0.5, "block": "parallel"},
        {"position": "alibi", "window": 4, "block": "parallel_one_norm"},
    ],
    ids=str,
)
def test_a_cache_changes_nothing(changes: dict[str, Any]) -> None:
    from teratron.generate.cache import KVCache

    config = dataclasses.replace(BASE, **changes)
    model = build_model(config, dtype=torch.float64)
    initialise(model, 1)
    assert isinstance(model, GPT)
    tokens = torch.randint(17, (2, 20), generator=torch.Generator().manual_seed(1))
    places = torch.arange(20).expand(2, -1)
    with torch.inference_mode():
        expected = model({"tokens": tokens, "positions": places})["hidden"]
        cache = KVCache(20)
        found = [model({"tokens": tokens[:, :9], "positions": places[:, :9]}, cache=cache)["hidden"]]
        for n in range(9, 20):
            now = places[:, n : n + 1]
            found.append(model({"tokens": tokens[:, n : n + 1], "positions": now, "order": now}, cache=cache)["hidden"])
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "alibi", "family": "encoder"}, "model.position = alibi looks back only, model.family = encoder does not"),
        ({"rope_share": 1.25}, "model.rope_share = 1.25 rotates 10 of a head's 8 features"),
        ({"rope_share": 0.4}, r"model.rope_share = 0.4 rotates 3 of a head's 8 features: choose a share that makes an even number"),
        ({"position": "learned", "rope_scaling": "linear"}, "model.rope_scaling = linear concerns rotary positions"),
        ({"rope_factor": 2.0}, "model.rope_factor = 2.0 concerns model.rope_scaling, which is none"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0}, "model.rope_scaling = yarn needs model.rope_original"),
        ({"rope_scaling": "linear", "rope_original": 8}, "model.rope_original = 8 concerns yarn and llama3"),
        ({"rope_scaling": "llama3", "rope_original": 8, "rope_sharpness": 1.0}, "model.rope_sharpness = 1.0 concerns yarn"),
        ({"rope_scaling": "llama3", "rope_original": 8, "rope_fast": 1.0}, "model.rope_fast = 1.0 is not above model.rope_slow = 1.0"),
        ({"block": "parallel", "norm_place": "sandwich"}, "model.block = parallel does not fit model.norm_place = sandwich"),
        ({"family": "encoder", "output_cap": 3.0}, "model.output_cap = 3.0 is for model.family = gpt, not encoder"),
        ({"latent": 8}, "model.latent = 8 needs rotated features beside the others"),
        ({"rope_dim": 8}, "model.rope_dim = 8 concerns model.latent, which is 0"),
        ({"latent": 8, "rope_dim": 4, "qk_norm": True}, "model.qk_norm = True does not fit model.latent = 8"),
        ({"latent": 8, "rope_dim": 4, "kv_heads": 2}, "model.kv_heads = 2 does not fit model.latent = 8"),
        ({"latent": 8, "rope_dim": 4, "value_dim": 20}, r"model.value_dim = 20 exceeds model.head_dim \+ model.rope_dim"),
        ({"experts": 6, "router_groups": 4}, "model.router_groups = 4 with model.groups_per_token = 1 does not fit"),
        ({"experts": 6, "router_groups": 6}, "model.router_groups = 6 with model.groups_per_token = 1 does not fit"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **changes)
