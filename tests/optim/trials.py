"""A tiny model that learns random batches, for tests of optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teratron.config import ModelConfig, OptimConfig, ParallelConfig
from teratron.models import Model, build_model, initialise
from teratron.optim import Optimizer, build_optimizer
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Mesh
from teratron.parallel.stages import Stages

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, seq_length=8, vocab_size=30, vocab_multiple=16, init_std=0.3, position="rope")
"""With rotary positions every parameter has a gradient; a key bias without them has rounding errors only, which Adam magnifies."""


def made(dtype: torch.dtype = torch.float64, **changes: Any) -> Model:
    model = build_model(ModelConfig(**{**vars(CONFIG), **changes}), dtype=dtype)
    initialise(model, 1)
    return model


def optimizer_of(model: Model, config: OptimConfig | None = None) -> Optimizer:
    return build_optimizer(FlatModel(Stages({0: model}), Mesh(), ParallelConfig()), config or OptimConfig())


def loss_of(model: Model, seed: int, scale: float = 1.0) -> Tensor:
    """The loss of a random batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, 3, CONFIG.seq_length), generator=generator)
    hidden = model({"tokens": tokens, "positions": torch.arange(CONFIG.seq_length).expand(3, -1)})["hidden"]
    return model.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) * scale / targets.numel()


def learn(optimizer: Optimizer, seed: int, number: int, lr: float, loss_scale: float = 1.0) -> float:
    """One whole step on a random batch."""
    optimizer.flat.backward(0, [loss_of(optimizer.flat.stages.stages()[0], seed, loss_scale)], [None], last=True)
    optimizer.flat.finish()
    return float(optimizer.step(number, lr, loss_scale))
