"""The same weights give the same logits and gradients as the `transformers` classes of BERT, RoBERTa and Megatron-LM's BERT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradients, read_weights
from torch import Tensor

from teratron.config import Config
from teratron.models import Model, build_model, flops_per_token, load_parts, parameter_count, parts_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB, LENGTH = 97, 24
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "max_position_embeddings": LENGTH,
    "vocab_size": VOCAB, "type_vocab_size": 2, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-with-sentences": ("BertForPreTraining", "BertConfig", {}),
    "bert": ("BertForMaskedLM", "BertConfig", {"hidden_act": "gelu_new"}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "pad_token_id": 1}),
    "megatron-bert": ("MegatronBertForPreTraining", "MegatronBertConfig", {}),
}


def theirs(variant: str) -> Any:
    """A `transformers` model with random weights that make logits of size 1, norms and biases random too."""
    name, settings, changes = VARIANTS[variant]
    config = getattr(transformers, settings)(**{**SIZES, **changes}, attn_implementation="eager")
    model = getattr(transformers, name)(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and path.endswith("weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def ours(model: Any, folder: Path) -> Model:
    model.save_pretrained(folder)
    config, tensors = read_weights(folder)
    twin = build_model(config)
    load_parts(twin, tensors)
    return twin


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    scale = float(expected.detach().abs().max())
    assert scale > 0.5
    assert float((found - expected).detach().abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(variant: str, tmp_path: Path) -> None:
    model = theirs(variant)
    twin = ours(model, tmp_path / "weights")
    draw = torch.Generator().manual_seed(5)
    tokens, targets = torch.randint(2, VOCAB, (2, 2, LENGTH), generator=draw).unbind()  # 1 is RoBERTa's padding
    types = torch.randint(twin.config.token_types, (2, LENGTH), generator=draw)
    labels = torch.tensor([0, 1])

    expected = model(tokens, token_type_ids=types)
    state = twin({"tokens": tokens, "positions": torch.arange(LENGTH).expand(2, -1), "token_types": types})
    paired = twin.config.pooler
    logits = expected.prediction_logits if paired else expected.logits
    close(twin.head.output(state["hidden"]), logits)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    found = twin.head.output.loss_sum(state["hidden"], targets, torch.ones(targets.shape)) / targets.numel()
    if paired:
        close(twin.head.sentence(state["pooled"])[:, 0], expected.seq_relationship_logits)
        loss = loss + F.cross_entropy(expected.seq_relationship_logits, labels)
        first = torch.zeros(targets.shape).index_fill(1, torch.tensor(0), 1.0)
        found = found + twin.head.sentence.loss_sum(state["pooled"], labels[:, None].expand(2, LENGTH), first) / 2
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    found.backward()
    compare_gradients(model, twin, tmp_path / "gradients")


def compare_gradients(model: Any, twin: Model, folder: Path) -> None:
    """Every part's gradient to 1e-4 of its largest element; a key's bias, whose exact gradient is 0, to the model's."""
    expected = gradients(model, folder)
    parameters = dict(twin.named_parameters())
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert {part.name for part in parts_of(twin)} == set(expected)
    for part in parts_of(twin):
        gradient, right = part.of(parameters[part.parameter].grad), expected[part.name]
        scale = largest if part.name.endswith(".k.bias") else float(right.abs().max())
        assert float((gradient - right).abs().max()) <= 1e-4 * scale, part.name


@pytest.mark.parametrize(
    ("preset", "name", "settings", "sizes"),
    [
        ("bert-base", "BertForPreTraining", "BertConfig", {}),
        (
            "roberta-base",
            "RobertaForMaskedLM",
            "RobertaConfig",
            {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        ),
        ("megatron-bert-336m", "MegatronBertForPreTraining", "MegatronBertConfig", {"vocab_size": 30522}),
    ],
)
def test_presets_have_the_published_sizes(preset: str, name: str, settings: str, sizes: dict[str, int]) -> None:
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, settings)(**sizes))
    assert parameter_count(build_model(Config.preset(preset).model, device="meta")) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_only_predicted_tokens_cost_an_output_projection(tied: bool) -> None:
    config = dataclasses.replace(Config.preset("bert-tiny").model, vocab_size=VOCAB, tie_embeddings=tied)
    model = build_model(config, device="meta")
    saved = flops_per_token(model, 64) - flops_per_token(model, 64, predicted=0.25)
    assert saved == pytest.approx(6 * 0.75 * VOCAB * config.hidden, rel=1e-12)
