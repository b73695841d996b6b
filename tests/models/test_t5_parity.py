"""The same weights give the same logits and gradients as the `transformers` classes of T5, T5 1.1 and BART."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradients, read_weights
from torch import Tensor, nn

from teratron.models import build_model, load_parts, parts_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB, READ, WRITTEN = 97, 150, 21
T5 = {"num_layers": 2, "d_model": 48, "d_ff": 80, "num_heads": 4, "d_kv": 10, "vocab_size": VOCAB, "dropout_rate": 0}
BART = {
    "encoder_layers": 2, "decoder_layers": 2, "d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": READ, "dropout": 0,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5),
    "t5-v1.1": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("Bart", BART),
}


def theirs(variant: str) -> Any:
    """A `transformers` model with random weights that make logits of size 1."""
    name, settings = VARIANTS[variant]
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    if not settings.get("tie_word_embeddings", True):  # which the class ties all the same
        model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, settings["d_model"]))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and path.endswith("weight") else 0.0
            scale = 1.0 if "relative" in path or path == "shared.weight" else 0.15
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    scale = float(expected.detach().abs().max())
    assert scale > 0.5
    assert float((found - expected).detach().abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(variant: str, tmp_path: Path) -> None:
    model = theirs(variant)
    model.save_pretrained(tmp_path / "weights")
    config, tensors = read_weights(tmp_path / "weights")
    twin = build_model(config)
    load_parts(twin, tensors)
    draw = torch.Generator().manual_seed(5)
    read = torch.randint(3, VOCAB, (2, READ), generator=draw)
    tokens, targets = torch.randint(3, VOCAB, (2, 2, WRITTEN), generator=draw).unbind()
    real = torch.ones_like(read)
    real[1, -40:] = 0

    logits = model(input_ids=read, attention_mask=real, decoder_input_ids=tokens).logits
    places = [torch.arange(length).expand(2, -1) for length in (READ, WRITTEN)]
    state = {"encoder_tokens": read, "encoder_positions": places[0], "tokens": tokens, "positions": places[1], "encoder_segments": real - 1}
    hidden = twin(state)["hidden"]
    close(twin.head.output(hidden), logits)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    found = twin.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) / targets.numel()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    found.backward()
    expected = gradients(model, tmp_path / "gradients")
    parameters = dict(twin.named_parameters())
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert {part.name for part in parts_of(twin)} == set(expected)
    for part in parts_of(twin):
        gradient, right = part.of(parameters[part.parameter].grad), expected[part.name]
        scale = largest if part.name.endswith(".k.bias") else float(right.abs().max())
        assert float((gradient - right).abs().max()) <= 1e-4 * scale, part.name
