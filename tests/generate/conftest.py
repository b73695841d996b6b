"""Small models with random weights for the generation tests, in both styles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from teratron.checkpoint import LoadedModel
from teratron.config import ModelConfig
from teratron.data.tokenizer import ByteTokenizer
from teratron.models import Model, build_model, initialise

STYLES = {
    "gpt2": {"position": "learned", "norm": "layernorm", "tie_embeddings": True},
    "llama": {
        "position": "rope",
        "norm": "rmsnorm",
        "tie_embeddings": False,
        "kv_heads": 2,
        "activation": "swiglu",
        "qk_norm": True,
        "bias": False,
    },
}


def small_model(style: str, positions: int = 64, **keys: Any) -> Model:
    """A float64 model over bytes whose logits are far from uniform."""
    config = ModelConfig(layers=2, hidden=32, heads=4, seq_length=positions, vocab_size=257, init_std=0.4, **STYLES[style] | keys)
    model = build_model(config, dtype=torch.float64)
    initialise(model, seed=1)
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    """A model of a style, with keys of its config replaced."""
    return small_model


@pytest.fixture(scope="session", params=list(STYLES))
def model(request: pytest.FixtureRequest) -> Model:
    """Each style in turn."""
    return small_model(request.param)


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """A GPT-2-style model over bytes, as if opened from a folder."""
    model = small_model("gpt2")
    return LoadedModel(model, model.config, ByteTokenizer(), "small")
