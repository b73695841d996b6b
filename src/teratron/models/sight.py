"""What attention may see: a rule on coordinates, which becomes a mask only where one is needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sight:
    """Which keys the queries may attend to. Padding has segment -1: it sees all that comes before, and only padding sees it."""

    causal: bool
    """Whether a query sees no later key."""
    window: int = 0
    """How many keys before its own place, its own counted, a query sees; 0 = all."""
    segments: Tensor | None = None
    """Documents of the queries, int64 [B, S]; None = one document."""
    key_segments: Tensor | None = None
    """Documents of the keys, int64 [B, T]; None = those of the queries."""
    whole_segments: Tensor | None = None
    """Where the queries are a share of a sequence, the documents of all of it."""
    whole_keys: Tensor | None = None
    """There, too, the dropout keys of all of it, int32."""
    order: Tensor | None = None
    """Places of the queries in their whole sequence, int64 [S]; None = 0 to S - 1."""
    key_order: Tensor | None = None
    """Places of the keys, int64 [T]; None = 0 to T - 1."""
    given: Tensor | None = None
    """bool [B or 1, 1, S, T] in place of all that."""
    _made: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)
    """Masks made before: all layers of a forward pass share them."""

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """bool [B or 1, 1, S, T] of what may be seen; None = all, or with `causal` all but what is later, places being 0, 1, ..."""
        if (queries, keys) not in self._made:
            self._made[queries, keys] = self._mask(queries, keys, device)
        return self._made[queries, keys]

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        if self.given is not None:
            return self.given
        visible = self._near(queries, keys, device)
        if self.segments is None:
            return visible
        others = self.segments if self.key_segments is None else self.key_segments
        same = ((self.segments[:, :, None] == others[:, None, :]) | (self.segments[:, :, None] < 0)).unsqueeze(1)
        return same if visible is None else same & visible

    def _near(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """By place alone, bool [1, 1, S, T]."""
        plain = self.order is None and self.key_order is None and not self.window and self.segments is None
        if not self.causal or plain:
            return None
        of_queries = torch.arange(queries, device=device) if self.order is None else self.order
        of_keys = torch.arange(keys, device=device) if self.key_order is None else self.key_order
        back = of_queries[:, None] - of_keys
        near = back >= 0
        return (near & (back < self.window) if self.window else near)[None, None]

    @cached_property
    def whole(self) -> Sight:
        """The sight of all queries of the sequence, of which these are a share."""
        return replace(self, segments=self.whole_segments, order=None, _made={})

    def block(self, places: Tensor) -> Sight:
        """The sight of the same queries on the keys at some places of the whole sequence, int64 [T]."""
        everything = self.whole_segments if self.key_segments is None else self.key_segments
        segments = None if everything is None else everything[:, places]
        return replace(self, key_segments=segments, key_order=places, _made={})
