"""The same weights give the same logits and gradients as the `transformers` classes, through `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradients, read_weights

from teratron.models import GPT, build_model, load_parts, parts_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB = 97
GPT2 = {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 40, "vocab_size": VOCAB, "embd_pdrop": 0, "resid_pdrop": 0, "attn_pdrop": 0}
LLAMA = {
    "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "vocab_size": VOCAB,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-tied": ("gpt2", {}),
    "gpt2-untied-exact-gelu": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 56}),
    "llama-untied": ("llama", {}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    "llama-long-wide-heads": ("llama", {"max_position_embeddings": 2048, "head_dim": 32, "rope_theta": 5e5, "num_hidden_layers": 1}),
}


def theirs(family: str, changes: dict[str, Any]) -> Any:
    """A `transformers` model with random weights that make logits of size 1, norms and biases random too."""
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **changes}, attn_implementation="eager"))
    else:
        theta = {"rope_parameters": {"rope_type": "default", "rope_theta": changes.get("rope_theta", 1e4)}}
        settings = {name: value for name, value in {**LLAMA, **changes}.items() if name != "rope_theta"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, **theta, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def ours(model: Any, folder: Path) -> GPT:
    model.save_pretrained(folder)
    config, tensors = read_weights(folder)
    twin = build_model(config)
    load_parts(twin, tensors)
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(variant: str, tmp_path: Path) -> None:
    model = theirs(*VARIANTS[variant])
    twin = ours(model, tmp_path / "weights")
    length = twin.config.seq_length if variant != "llama-long-wide-heads" else 600
    tokens, targets = torch.randint(VOCAB, (2, 2, length), generator=torch.Generator().manual_seed(5)).unbind()

    expected = model(tokens).logits
    hidden = twin({"tokens": tokens, "positions": torch.arange(length).expand(2, length)})["hidden"]
    assert twin.head is not None
    found = twin.head.output(hidden)
    scale = float(expected.detach().abs().max())
    assert scale > 1
    assert float((found - expected).detach().abs().max()) <= 1e-5 * scale

    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss.backward()
    (twin.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) / targets.numel()).backward()
    compare_gradients(model, twin, tmp_path / "gradients")


def compare_gradients(model: Any, twin: GPT, folder: Path) -> None:
    """Every part's gradient to 1e-4 of its largest element; a key bias, whose exact gradient is 0 without rotation, to the model's."""
    expected = gradients(model, folder)
    parameters = dict(twin.named_parameters())
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for part in parts_of(twin):
        gradient, right = part.of(parameters[part.parameter].grad), expected[part.name]
        vanishes = part.name.endswith(".k.bias") and twin.config.position != "rope"
        scale = largest if vanishes else float(right.abs().max())
        assert float((gradient - right).abs().max()) <= 1e-4 * scale, part.name
    if twin.config.vocab_multiple > 1:
        assert (parameters["embedding.tokens.weight"].grad[VOCAB:] == 0).all()
