"""The feed-forward layer and its activations. Shape letters: see `leaves.py`."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.leaves import Linear


class FeedForward(nn.Module):
    """Two linear layers with an activation between, or a gated pair."""

    def __init__(self, config: ModelConfig, width: int, bias: bool) -> None:
        super().__init__()
        self.activation = config.activation
        widths: int | dict[str, int] = {"gate": width, "up": width} if config.gated else width
        self.up = Linear(config.hidden, widths, bias, config.matrix_std)
        self.down = Linear(width, config.hidden, bias, config.matrix_std / math.sqrt(2 * config.layers))

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(activate(self.up(x_BSH), self.activation))


def activate(x: Tensor, kind: str) -> Tensor:
    """The feed-forward activation; the gated ones take [gate, up] side by side and halve the width."""
    if kind in ("swiglu", "geglu", "geglu_tanh"):
        gate, up = x.chunk(2, dim=-1)
        return gated(gate, up, kind)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The product of swiglu, geglu or geglu_tanh."""
    return (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh" if kind == "geglu_tanh" else "none")) * up
