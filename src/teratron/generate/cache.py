"""The key-value cache: memory of the tokens seen so far, allocated once for a whole generation."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of every layer, [B, K, capacity, D] each; a `models.gpt.Cache`.

    A forward pass appends the same columns in each layer, and `advance` moves past them once, after the last layer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        """Columns in all, and in use."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write new columns of a layer behind those in use; return views of all its columns, [B, K, T, D]."""
        stop = self.length + k_BKSD.shape[2]
        if stop > self.capacity:
            raise IndexError(f"cache of {self.capacity} columns cannot hold {stop}")
        if layer not in self.layers:
            keys, values = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k_BKSD, v_BKSD))
            self.layers[layer] = keys, values
        keys, values = self.layers[layer]
        keys[:, :, self.length : stop] = k_BKSD
        values[:, :, self.length : stop] = v_BKSD
        return keys[:, :, :stop], values[:, :, :stop]

    def advance(self, columns: int) -> None:
        """Count the columns that every layer has appended as used."""
        self.length += columns

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only (int64 [B'], ascending), freeing the others' memory layer by layer."""
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys[rows], values[rows]
