"""`train.compile`: a compiled block gives the eager block's numbers, dropout masks and gradients included."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from teratron.config import ModelConfig
from teratron.models import build_model, initialise, with_dropout


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_blocks_equal_eager_ones_with_dropout() -> None:
    config = ModelConfig(
        layers=1, hidden=16, heads=2, seq_length=8, vocab_size=20, position="rope", activation="swiglu", dropout=0.3, attention_dropout=0.2
    )
    eager = build_model(config)
    initialise(eager, 1)
    compiled = copy.deepcopy(eager)
    compiled.blocks["0"].compile()
    positions = torch.arange(8).expand(2, 8)
    state = {"tokens": torch.arange(16).view(2, 8), "positions": positions}
    state = with_dropout(state, eager.streams, 1, 3, torch.arange(2))
    outputs = [model(dict(state))["hidden"] for model in (eager, compiled)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for (name, expected), found in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=name)
