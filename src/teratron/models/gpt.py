"""The GPT family: a decoder described by config, GPT-2 style and modern style, as ordered units (contract C5).

Plain single-device code; nothing here knows of processes. Shape letters: see `leaves.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.head import LanguageHead
from teratron.models.leaves import AttentionCore, Dropout, Embedding, Linear, Norm, accurate

State = dict[str, Tensor]


class Cache(Protocol):
    """Keys and values of the tokens seen so far, one pair a layer."""

    def append(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values of a layer; return all of them, [B, K, T, D]."""


@dataclass(frozen=True)
class Shared:
    """What all units of one forward pass use; derived from the batch's coordinates on every stage, never sent."""

    positions: Tensor
    """int64 [B, S]."""
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin [B, 1, S, D / 2], or None."""
    mask: Tensor | None
    """bool [B, 1, S, T] of what may be seen, or None = causal."""
    keys: Tensor | None
    """Dropout keys int32 [B, S], or None = no dropout."""
    cache: Cache | None = None


class TokenEmbedding(nn.Module):
    """First unit: tokens -> hidden."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = Embedding(config.vocab_size, config.hidden, config.init_std, config.vocab_multiple)
        self.positions = Embedding(config.positions, config.hidden, config.init_std) if config.position == "learned" else None
        self.dropout = Dropout(config.dropout, "embedding.dropout")

    def forward(self, state: State, shared: Shared) -> State:
        hidden_BSH = self.tokens(state["tokens"])
        if self.positions is not None:
            hidden_BSH = hidden_BSH + self.positions(shared.positions)
        return {"hidden": self.dropout(hidden_BSH, shared.keys)}


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_features = layer, config.head_features
        queries, pairs = config.heads * config.head_features, config.key_value_heads * config.head_features
        self.qkv = Linear(config.hidden, {"q": queries, "k": pairs, "v": pairs}, config.bias, config.init_std)
        self.q_norm = Norm(config.head_features, "rmsnorm", False, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_features, "rmsnorm", False, config.norm_eps) if config.qk_norm else None
        self.core = AttentionCore(config.attention_dropout, f"blocks.{layer}.attention.core")
        self.output = Linear(queries, config.hidden, config.bias, config.init_std / math.sqrt(2 * config.layers))

    def forward(self, x_BSH: Tensor, shared: Shared) -> Tensor:
        parts = self.qkv(x_BSH).split(list(self.qkv.widths.values()), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_features)).transpose(1, 2) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if shared.rotary is not None:
            q, k = rotate(q, *shared.rotary), rotate(k, *shared.rotary)
        if shared.cache is not None:
            k, v = shared.cache.append(self.layer, k, v)
        mixed_BNSD = self.core(q, k, v, shared.mask, shared.keys)
        return self.output(mixed_BNSD.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with an activation between, or a gated pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        widths: int | dict[str, int] = {"gate": config.ffn_width, "up": config.ffn_width} if config.gated else config.ffn_width
        self.up = Linear(config.hidden, widths, config.bias, config.init_std)
        self.down = Linear(config.ffn_width, config.hidden, config.bias, config.init_std / math.sqrt(2 * config.layers))

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(activate(self.up(x_BSH), self.activation))


class Block(nn.Module):
    """One transformer layer, norm first."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.hidden, config.norm, config.bias, config.norm_eps)
        self.attention = Attention(config, layer)
        self.attention_dropout = Dropout(config.dropout, f"blocks.{layer}.attention.dropout")
        self.ffn_norm = Norm(config.hidden, config.norm, config.bias, config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_dropout = Dropout(config.dropout, f"blocks.{layer}.ffn.dropout")

    def forward(self, state: State, shared: Shared) -> State:
        hidden = state["hidden"]
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), shared), shared.keys)
        hidden = hidden + self.ffn_dropout(self.ffn(self.ffn_norm(hidden)), shared.keys)
        return {**state, "hidden": hidden}


class Head(nn.Module):
    """Last unit: final norm; `output` then gives logits or losses."""

    def __init__(self, config: ModelConfig, shared_weight: nn.Parameter | None) -> None:
        super().__init__()
        self.norm = Norm(config.hidden, config.norm, config.bias, config.norm_eps)
        name = "/embedding.tokens.weight" if config.tie_embeddings else ".weight"
        self.output = LanguageHead(config.hidden, config.vocab_size, config.vocab_multiple, config.init_std, shared_weight, name)

    def forward(self, state: State, shared: Shared) -> State:
        return {**state, "hidden": self.norm(state["hidden"])}


class GPT(nn.Module):
    """Units 0 (embedding), 1..layers (blocks), layers + 1 (head), or any range of them.

    Parameters are uninitialised: see `parts.initialise`.
    """

    def __init__(self, config: ModelConfig, units: range | None = None) -> None:
        super().__init__()
        self.config = config
        units = units if units is not None else range(config.layers + 2)
        self.embedding = TokenEmbedding(config) if 0 in units else None
        self.blocks = nn.ModuleDict({str(n - 1): Block(config, n - 1) for n in units if 1 <= n <= config.layers})
        shared = self.embedding.tokens.weight if self.embedding is not None and config.tie_embeddings else None
        self.head = Head(config, shared) if config.layers + 1 in units else None

    def units(self) -> Iterable[nn.Module]:
        """The units of this range in order."""
        return [unit for unit in (self.embedding, *self.blocks.values(), self.head) if unit is not None]

    def forward(self, state: State, mask: Tensor | None = None, keys: Tensor | None = None, cache: Cache | None = None) -> State:
        """Run the units in order; the result holds hidden [B, S, H], which is all that the next stage needs to be sent.

        Args:
            state: what the stage before sent (tokens [B, S] for the first unit), and this rank's own coordinates: positions
                [B, S], and segments [B, S] when documents are isolated.
            mask: bool [B, 1, S, T] of what may be seen; None = causal, within segments if there are some.
            keys: dropout keys; None = no dropout. cache: keys and values of earlier tokens.
        """
        positions, segments = state["positions"], state.get("segments")
        if mask is None and segments is not None:
            mask = document_mask(segments)
        shared = Shared(positions, self.rotary(positions), mask, keys, cache)
        state = {name: tensor for name, tensor in state.items() if name not in ("positions", "segments")}
        for unit in self.units():
            state = unit(state, shared)
        return state

    def rotary(self, positions_BS: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin of each position's angles, [B, 1, S, D / 2] (Su et al. 2021)."""
        if self.config.position != "rope":
            return None
        dtype = next(self.parameters()).dtype
        exponents = torch.arange(0, self.config.head_features, 2, dtype=accurate(dtype), device=positions_BS.device)
        frequencies = 1 / self.config.rope_theta ** (exponents / self.config.head_features)  # the field's rounding, bit for bit
        angles = positions_BS[:, None, :, None].to(accurate(dtype)) * frequencies
        return angles.cos(), angles.sin()


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head's features by the positions' angles, in float32 for half types."""
    first, second = x_BNSD.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BNSD.dtype)


def activate(x: Tensor, kind: str) -> Tensor:
    """The feed-forward activation; the gated ones take [gate, up] side by side and halve the width."""
    if kind in ("swiglu", "geglu"):
        gate, up = x.chunk(2, dim=-1)
        return (F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * up
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def document_mask(segments_BS: Tensor) -> Tensor:
    """Causal attention within each document: bool [B, 1, S, S]."""
    same = segments_BS[:, :, None] == segments_BS[:, None, :]
    return same.tril().unsqueeze(1)
