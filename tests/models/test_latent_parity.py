"""Mixtures of experts and latent attention: the same weights give the same logits and gradients as the `transformers` classes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradients, read_weights

from teratron.config import Config, ModelConfig
from teratron.config.meaning import meaning
from teratron.models import GPT, build_model, load_parts, parameter_count, parts_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB, LENGTH = 97, 40
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
MIXTRAL = {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2, "num_local_experts": 5, "sliding_window": None}
DEEPSEEK = {
    **SIZES, "intermediate_size": 80, "moe_intermediate_size": 24, "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 8,
    "kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
BASE = ModelConfig(
    layers=3, hidden=48, heads=4, seq_length=64, vocab_size=VOCAB, norm="rmsnorm", norm_eps=1e-6, activation="swiglu", position="rope",
    tie_embeddings=False, bias=False, normalise_gates=True,
)  # fmt: skip


def made(base: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**base.__dict__, **changes})


LATENT = made(
    BASE, ffn=80, expert_ffn=24, experts=8, experts_per_token=3, shared_experts=2, moe_first_dense=1, head_dim=16, latent=20,
    latent_query=28, rope_dim=8, value_dim=12, router_groups=4, groups_per_token=2,
)  # fmt: skip
V3 = made(LATENT, router="sigmoid", router_balance="bias", gate_scale=2.5)
MODELS: dict[str, tuple[str, dict[str, Any], ModelConfig]] = {
    "Mixtral": ("Mixtral", MIXTRAL, made(BASE, ffn=40, kv_heads=2, experts=5, norm_eps=1e-5, rope_theta=1e6)),
    "DeepseekV3": ("DeepseekV3", DEEPSEEK, V3),
    "DeepseekV2": (
        "DeepseekV2",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "head_dim": 8, "routed_scaling_factor": 1.5, "q_lora_rank": None},
        made(LATENT, latent_query=0, normalise_gates=False, gate_scale=1.5),
    ),
    "Qwen3Moe": (
        "Qwen3Moe",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
        made(BASE, kv_heads=2, head_dim=16, qk_norm=True, experts=6, experts_per_token=3, expert_ffn=24),
    ),
    "DeepseekV3-yarn": (
        "DeepseekV3",
        {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": YARN},
        made(V3, latent_query=0, rope_scaling="yarn", rope_factor=4.0, rope_original=16),
    ),
}


def theirs(name: str, settings: dict[str, Any]) -> Any:
    """A `transformers` model with random weights that make logits of size 1; norms and the routers' biases are random too."""
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in path:
                centre = 1.0 if tensor.dim() == 1 and path.endswith("weight") else 0.0
                tensor.copy_(centre + 0.15 * torch.randn(tensor.shape, generator=draw))
    return model.float().eval()


@pytest.mark.parametrize("variant", MODELS)
def test_logits_and_gradients_equal_transformers(variant: str, tmp_path: Path) -> None:
    name, settings, expected_config = MODELS[variant]
    model = theirs(name, settings)
    model.save_pretrained(tmp_path / "weights")
    config, weights = read_weights(tmp_path / "weights")
    assert meaning(config) == meaning(expected_config)
    twin = build_model(config)
    assert isinstance(twin, GPT)
    load_parts(twin, weights)
    tokens, targets = torch.randint(VOCAB, (2, 2, LENGTH), generator=torch.Generator().manual_seed(5)).unbind()

    expected = model(tokens).logits
    hidden = twin({"tokens": tokens, "positions": torch.arange(LENGTH).expand(2, LENGTH)})["hidden"]
    found = twin.head.output(hidden)
    scale = float(expected.detach().abs().max())
    assert scale > 1
    assert float((found - expected).detach().abs().max()) <= 1e-5 * scale

    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    (twin.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) / targets.numel()).backward()
    right = gradients(model, tmp_path / "gradients")
    parameters = dict(twin.named_parameters())
    for part in parts_of(twin):
        if not part.name.endswith("router.bias"):
            gradient = part.of(parameters[part.parameter].grad)
            assert float((gradient - right[part.name]).abs().max()) <= 1e-4 * float(right[part.name].abs().max()), part.name


def test_a_cache_of_latents_changes_nothing() -> None:
    """Few queries meet the latents themselves; tokens come one by one, in pieces, and padded."""
    from teratron.generate.cache import KVCache
    from teratron.models import initialise

    model = build_model(made(V3, init_std=0.3, window=9, global_every=2), dtype=torch.float64)
    initialise(model, 1)
    assert isinstance(model, GPT)
    tokens = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    places = torch.arange(20).expand(2, -1)
    with torch.inference_mode():
        expected = model({"tokens": tokens, "positions": places})["hidden"]
        cache, found = KVCache(20), []
        for start, stop in ((0, 9), (9, 12), *((n, n + 1) for n in range(12, 20))):
            now = places[:, start:stop]
            found.append(model({"tokens": tokens[:, start:stop], "positions": now, "order": now}, cache=cache)["hidden"])
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-12)
    width = V3.latent + V3.rope_dim
    assert all(keys.shape[-1] + values.shape[-1] == width and keys.shape[1] == 1 for keys, values in cache.layers.values())


PUBLISHED = {
    "mixtral-8x7b": ("Mixtral", {}),
    "deepseek-v3": ("DeepseekV3", {"num_nextn_predict_layers": 0}),
    "deepseek-v2-lite": (
        "DeepseekV2",
        {
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
            "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64, "q_lora_rank": None,
            "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        },
    ),
    "qwen3-30b-a3b": ("Qwen3Moe", {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}),
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_sizes(preset: str) -> None:
    name, settings = PUBLISHED[preset]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    config = Config.preset(preset).model
    assert _weights(config) == sum(p.numel() for p in theirs.parameters())


def _weights(config: ModelConfig) -> int:
    """Parameters without the routers' biases, which are no parameters there."""
    model = build_model(config, device="meta")
    return parameter_count(model) - sum(math.prod(part.shape) for part in parts_of(model) if part.name.endswith("router.bias"))
