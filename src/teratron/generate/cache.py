"""The key-value cache: memory of the tokens seen so far, allocated once for a whole generation."""

from __future__ import annotations

import torch
from torch import Tensor

from teratron.config import ModelConfig


class KVCache:
    """Keys and values of every layer, [B, K, capacity, D] each; a `models.gpt.Cache`.

    A forward pass appends the same columns in each layer, and `advance` moves past them once, after the last layer.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.key_value_heads, capacity, config.head_features)
        self.length = 0
        """Columns in use."""
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]

    def append(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write new columns of a layer behind those in use; return views of all its columns, [B, K, T, D]."""
        stop = self.length + k_BKSD.shape[2]
        if stop > self.keys[layer].shape[2]:
            raise IndexError(f"cache of {self.keys[layer].shape[2]} columns cannot hold {stop}")
        self.keys[layer][:, :, self.length : stop] = k_BKSD
        self.values[layer][:, :, self.length : stop] = v_BKSD
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def advance(self, columns: int) -> None:
        """Count the columns that every layer has appended as used."""
        self.length += columns

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only (int64 [B'], ascending), freeing the others' memory layer by layer."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]
