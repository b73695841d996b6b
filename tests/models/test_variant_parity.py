"""Variants of blocks and positions: the same weights give logits and gradients as Gemma 2, GPT-NeoX, Cohere and BLOOM in `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradients, read_weights

from teratron.models import GPT, build_model, load_parts, parts_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB, LENGTH, HIDDEN, HEADS = 97, 24, 48, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 80}


GEMMA = {
    **SIZES, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu", "sliding_window": 9,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
NEOX = {**SIZES, "max_position_embeddings": 64, "rotary_pct": 0.5, "hidden_act": "gelu", "tie_word_embeddings": False}
COHERE = {**SIZES, "num_key_value_heads": 2, "logit_scale": 1.0, "tie_word_embeddings": True, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "Gemma2": GEMMA,
    "GPTNeoX": NEOX,
    "Cohere": COHERE,
    "Bloom": {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS},
}


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
def test_logits_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    model = theirs(name, MODELS[name])
    model.save_pretrained(tmp_path / "weights")
    config, weights = read_weights(tmp_path / "weights")
    twin = build_model(config)
    assert isinstance(twin, GPT)
    load_parts(twin, weights)
    tokens, targets = torch.randint(1, VOCAB, (2, 2, LENGTH), generator=torch.Generator().manual_seed(5)).unbind()

    expected = model(tokens).logits
    hidden = twin({"tokens": tokens, "positions": torch.arange(LENGTH).expand(2, LENGTH)})["hidden"]
    scale = float(expected.detach().abs().max())
    assert scale > 1
    assert float((twin.head.output(hidden) - expected).detach().abs().max()) <= 1e-5 * scale

    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    (twin.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) / targets.numel()).backward()
    right = gradients(model, tmp_path / "gradients")
    parameters = dict(twin.named_parameters())
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    for part in parts_of(twin):
        gradient = part.of(parameters[part.parameter].grad)
        vanishes = part.name.endswith(".k.bias") and twin.config.position != "rope"
        scale = largest if vanishes else float(right[part.name].abs().max())
        assert float((gradient - right[part.name]).abs().max()) <= 1e-4 * scale, part.name
