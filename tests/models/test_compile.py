"""`train.compile`: a compiled block gives the eager block's numbers, dropout masks and gradients included."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from teratron.config import Config, ModelConfig
from teratron.models import build_model, initialise, with_dropout
from teratron.parallel.mesh import Mesh
from teratron.train.engine import Engine


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


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile on CPU needs a C++ compiler")
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_what_is_recomputed_is_compiled_too(mode: str) -> None:
    keys: dict[str, object] = {"model.layers": 1, "model.hidden": 16, "model.heads": 2, "model.seq_length": 8, "model.vocab_size": 20}
    keys |= {"train.recompute": mode, "train.global_batch": 2}
    batch = {"tokens": torch.arange(16).view(2, 8), "positions": torch.arange(8).expand(2, 8), "sample": torch.arange(2)}
    batch |= {"targets": batch["tokens"] + 1, "weights": torch.ones(2, 8)}
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        engine = Engine(Config().override(keys | {"train.compile": compiled}), Mesh())
        engine.optimizer.initialise(1)
        tally, norm = engine.step(batch, step=1, number=1, lr=0.1)
        found.append((float(tally.loss()), float(norm)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)
