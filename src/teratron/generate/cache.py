"""Key-value caches: memory of the tokens seen so far, which grows or has a fixed place for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from teratron.models.patterns import Pattern
from teratron.models.sight import Sight


class Held:
    """What layers hold of a batch."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """[B, K, room, D] each."""
        self.memories: dict[int, tuple[Tensor, Tensor]] = {}
        """Of an encoder's memory, [B, K, T, D] each."""

    def memory(self, layer: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's memory, which never change: made once a layer."""
        if layer not in self.memories:
            self.memories[layer] = make()
        return self.memories[layer]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch (int64 [B'], each any number of times), freeing the others' memory layer by layer."""
        for held in (self.layers, self.memories):
            for layer, (keys, values) in held.items():
                held[layer] = keys[rows], values[rows]


class KVCache(Held):
    """A `models.units.Cache` that grows; layers with a window keep no more than what later tokens see.

    In a forward pass every layer gets the same tokens once.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: tokens in all, for which layers without a window have room from the beginning."""
        super().__init__()
        self.capacity = capacity
        self._columns: dict[Pattern, _Columns] = {}

    def append(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Sight]:
        """Add new tokens; return the keys and values [B, K, T, D] that they may see, and which of them they do."""
        columns = self._columns.setdefault(sight.pattern, _Columns(sight.pattern, self.capacity))
        columns.arrive(sight, k_BKSD)
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_empty(*x.shape[:2], columns.room, x.shape[3]) for x in (k_BKSD, v_BKSD))  # type: ignore[assignment]
        keys, values = (columns.add(*pair) for pair in zip(self.layers[layer], (k_BKSD, v_BKSD), strict=True))
        return keys, values, columns.sight

    def keep(self, rows: Tensor) -> None:
        for columns in self._columns.values():
            columns.places = columns.places[rows]
        super().keep(rows)


class FixedCache(Held):
    """A `models.units.Cache` with a column for every token from the beginning, so that tokens may come again in place of others.

    What is behind a row's newest token needs no clearing: it is later than all that look.
    """

    def __init__(self, capacity: int, padding_B: Tensor) -> None:
        """capacity: columns. padding_B: those of each row that come before its first token, int64."""
        super().__init__()
        self.capacity, self.padding_B1 = capacity, padding_B[:, None]
        self.used = capacity
        """Columns that are looked at."""
        self._seen: dict[Pattern, tuple[Sight, Sight]] = {}
        """For each pattern the sight that came last, and what it became."""

    def append(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Sight]:
        """Write tokens where their places (`sight.order`) are; return the keys and values [B, K, T, D] that they may see, and which."""
        first = layer not in self.layers
        if first:
            self.layers[layer] = tuple(x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (k_BKSD, v_BKSD))  # type: ignore[assignment]
        columns = torch.arange(k_BKSD.shape[2], device=k_BKSD.device)[None] if sight.order is None else sight.order + self.padding_B1
        held = self.layers[layer]
        for room, new in zip(held, (k_BKSD, v_BKSD), strict=True):
            room.scatter_(2, columns[:, None, :, None].expand_as(new), new)
        if first:
            return k_BKSD, v_BKSD, self._sight(sight, first)
        return held[0][:, :, : self.used], held[1][:, :, : self.used], self._sight(sight, first)

    def _sight(self, sight: Sight, first: bool) -> Sight:
        """What the layers of one pattern share; `first`: the columns hold nothing else than the new tokens."""
        came, becomes = self._seen.get(sight.pattern, (None, sight))
        if came is not sight:
            places = sight.order if first else torch.arange(self.used, device=self.padding_B1.device) - self.padding_B1
            becomes = sight if places is None else replace(sight, key_order=places, _made={})
            self._seen[sight.pattern] = sight, becomes
        return becomes

    def keep(self, rows: Tensor) -> None:
        self.padding_B1 = self.padding_B1[rows]
        super().keep(rows)


class _Columns:
    """Which tokens the layers of one pattern hold, and where."""

    sight: Sight
    """What the tokens that came last see of the columns."""

    def __init__(self, pattern: Pattern, capacity: int) -> None:
        self.pattern = pattern
        self.kept = min(capacity, pattern.reach + pattern.global_tokens) if pattern.reach else capacity
        """Columns that later tokens see, at most."""
        self.room = min(capacity, 2 * self.kept)
        self.places = torch.empty(1, 0, dtype=torch.int64)
        """Of the tokens in their sequences, int64 [B, T]; below 0: there is none."""
        self._came: Sight | None = None
        self._start = 0
        self._chosen: Tensor | None = None
        """The columns to go on with, int64 [B, kept]; None = all."""

    def arrive(self, sight: Sight, keys: Tensor) -> None:
        """Make room for new tokens, unless another layer has had them already."""
        if sight is self._came:
            return
        self._came, self._start, self._chosen = sight, self.places.shape[1], None
        new = torch.arange(keys.shape[2], device=keys.device)[None] if sight.order is None else sight.order
        new = new.expand(keys.shape[0], -1)
        self.places = torch.cat([self.places, new], dim=1) if self._start else new
        whole = not self._start and sight.order is None
        self.sight = sight if whole else replace(sight, key_order=self.places, _made={})
        if self.places.shape[1] > self.room:
            self._forget()

    def _forget(self) -> None:
        if not self.pattern.reach:
            raise IndexError(f"cache of {self.room} columns cannot hold {self.places.shape[1]}")
        places = self.places
        near = places > places.amax(1, keepdim=True) - self.pattern.reach
        wanted = (places >= 0) & (near | (places < self.pattern.global_tokens))
        self._chosen = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, : self.kept]
        self.places = places.masked_fill(~wanted, -1).gather(1, self._chosen)

    def add(self, held: Tensor, new: Tensor) -> Tensor:
        """Write new tokens' keys or values [B, K, S, D] into a layer's columns; return them behind those that were there."""
        if self._chosen is None:
            stop = self._start + new.shape[2]
            held[:, :, self._start : stop] = new
            return held[:, :, :stop]
        whole = torch.cat([held[:, :, : self._start], new], dim=2) if self._start else new
        chosen = self._chosen[:, None, :, None].expand(-1, *whole.shape[1:2], -1, whole.shape[3])
        held[:, :, : self.kept] = whole.gather(2, chosen)
        return whole
