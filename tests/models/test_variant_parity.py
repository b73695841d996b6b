"""Variants of blocks and positions: the same weights give logits and gradients as Gemma 2, GPT-NeoX, Cohere and BLOOM in `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import ModelConfig
from teratron.models import GPT, build_model, load_parts, parts_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB, LENGTH, HIDDEN, HEADS = 97, 24, 48, 4
WIDTH = HIDDEN // HEADS
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 80}
BASE = {"layers": 2, "hidden": HIDDEN, "heads": HEADS, "ffn": 80, "seq_length": LENGTH, "vocab_size": VOCAB}
Tensors = Mapping[str, Tensor]


def gemma2(their: Tensors) -> dict[str, Tensor]:
    """Its norms' weights are 1 less than ours; gradients are the same, so the caller adds it."""
    found = {"embedding.tokens.weight": their["model.embed_tokens.weight"], "head.norm.weight": their["model.norm.weight"]}
    names = {"self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v"}
    names |= {
        "self_attn.o_proj": "attention.output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_output_norm",
    }
    names |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "ffn_output_norm"}
    names |= {f"mlp.{name}_proj": f"ffn.{name}" for name in ("gate", "up", "down")}
    for layer in range(2):
        found |= {f"blocks.{layer}.{ours}.weight": their[f"model.layers.{layer}.{name}.weight"] for name, ours in names.items()}
    return found


def neox(their: Tensors) -> dict[str, Tensor]:
    found = {"embedding.tokens.weight": their["gpt_neox.embed_in.weight"], "head.output.weight": their["lm_head.weight"]}
    for kind in ("weight", "bias"):
        found[f"head.norm.{kind}"] = their[f"gpt_neox.final_layer_norm.{kind}"]
        for layer in range(2):
            block, ours = f"gpt_neox.layers.{layer}", f"blocks.{layer}"
            names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "attention.dense": "attention.output"}
            names |= {"mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down"}
            found |= {f"{ours}.{name}.{kind}": their[f"{block}.{other}.{kind}"] for other, name in names.items()}
            found |= fused(their[f"{block}.attention.query_key_value.{kind}"], f"{ours}.attention", kind)
    return found


def bloom(their: Tensors) -> dict[str, Tensor]:
    found = {"embedding.tokens.weight": their["transformer.word_embeddings.weight"]}
    for kind in ("weight", "bias"):
        found[f"embedding.norm.{kind}"] = their[f"transformer.word_embeddings_layernorm.{kind}"]
        found[f"head.norm.{kind}"] = their[f"transformer.ln_f.{kind}"]
        for layer in range(2):
            block, ours = f"transformer.h.{layer}", f"blocks.{layer}"
            names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
            names |= {"self_attention.dense": "attention.output", "mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down"}
            found |= {f"{ours}.{name}.{kind}": their[f"{block}.{other}.{kind}"] for other, name in names.items()}
            found |= fused(their[f"{block}.self_attention.query_key_value.{kind}"], f"{ours}.attention", kind)
    return found


def fused(rows: Tensor, ours: str, kind: str) -> dict[str, Tensor]:
    """Query, key and value of each head, one below the other."""
    parts = rows.unflatten(0, (HEADS, 3, WIDTH)).unbind(1)
    return {f"{ours}.{name}.{kind}": part.flatten(0, 1) for name, part in zip("qkv", parts, strict=True)}


def cohere(their: Tensors) -> dict[str, Tensor]:
    """It rotates neighbouring features, ours are halves."""
    found = {"embedding.tokens.weight": their["model.embed_tokens.weight"], "head.norm.weight": their["model.norm.weight"]}
    for layer in range(2):
        block, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for name in "qkv":
            rows = their[f"{block}.self_attn.{name}_proj.weight"].unflatten(0, (-1, WIDTH))
            order = torch.arange(WIDTH) if name == "v" else torch.cat((torch.arange(0, WIDTH, 2), torch.arange(1, WIDTH, 2)))
            found[f"{ours}.attention.{name}.weight"] = rows[:, order].flatten(0, 1)
        found[f"{ours}.attention.output.weight"] = their[f"{block}.self_attn.o_proj.weight"]
        found[f"{ours}.attention_norm.weight"] = their[f"{block}.input_layernorm.weight"]
        found |= {f"{ours}.ffn.{name}.weight": their[f"{block}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    return found


GEMMA = {
    **SIZES, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu", "sliding_window": 9,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
NEOX = {**SIZES, "max_position_embeddings": 64, "rotary_pct": 0.5, "hidden_act": "gelu", "tie_word_embeddings": False}
COHERE = {**SIZES, "num_key_value_heads": 2, "logit_scale": 1.0, "tie_word_embeddings": True, "max_position_embeddings": 64}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Tensors], dict[str, Tensor]]]] = {
    "Gemma2": (
        GEMMA,
        {
            "kv_heads": 2, "head_dim": 16, "norm": "rmsnorm", "norm_eps": 1e-6, "norm_place": "sandwich", "activation": "geglu",
            "position": "rope", "bias": False, "attention_cap": 2.0, "output_cap": 3.0, "scale_embeddings": True, "window": 9,
            "global_every": 2,
        },
        gemma2,
    ),
    "GPTNeoX": (NEOX, {"position": "rope", "rope_share": 0.5, "block": "parallel", "tie_embeddings": False}, neox),
    "Cohere": (
        COHERE,
        {"kv_heads": 2, "position": "rope", "rope_theta": 5e5, "block": "parallel_one_norm", "bias": False, "activation": "swiglu"},
        cohere,
    ),
    "Bloom": (
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS},
        {"position": "alibi", "embedding_norm": True, "activation": "gelu_tanh", "ffn": 4 * HIDDEN},
        bloom,
    ),
}  # fmt: skip


def theirs(name: str, settings: dict[str, Any]) -> Any:
    """A `transformers` model with random weights that make logits of size 1, norms and biases random too."""
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and path.endswith("weight") and name != "Gemma2" else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=draw))
    return model.float().eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    settings, changes, by_part = MODELS[name]
    model = theirs(name, settings)
    twin = build_model(ModelConfig(**{**BASE, **changes}))
    assert isinstance(twin, GPT)
    weights = by_part(dict(model.named_parameters()))
    shift = 1.0 if name == "Gemma2" else 0.0
    load_parts(twin, {path: tensor + shift if path.endswith("norm.weight") else tensor for path, tensor in weights.items()})
    tokens, targets = torch.randint(1, VOCAB, (2, 2, LENGTH), generator=torch.Generator().manual_seed(5)).unbind()

    expected = model(tokens).logits
    hidden = twin({"tokens": tokens, "positions": torch.arange(LENGTH).expand(2, LENGTH)})["hidden"]
    scale = float(expected.detach().abs().max())
    assert scale > 1
    assert float((twin.head.output(hidden) - expected).detach().abs().max()) <= 1e-5 * scale

    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    (twin.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) / targets.numel()).backward()
    right = by_part({path: parameter.grad for path, parameter in model.named_parameters()})
    parameters = dict(twin.named_parameters())
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    for part in parts_of(twin):
        gradient = part.of(parameters[part.parameter].grad)
        vanishes = part.name.endswith(".k.bias") and twin.config.position != "rope"
        scale = largest if vanishes else float(right[part.name].abs().max())
        assert float((gradient - right[part.name]).abs().max()) <= 1e-4 * scale, part.name
