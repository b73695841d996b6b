"""What attention may see: a rule on coordinates, which becomes a mask only where one is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from teratron.models.patterns import FULL, Pattern, Tiles, tiles_of
from teratron.models.relative import bias_by_distance, bias_by_place


@dataclass(frozen=True, eq=False)
class Sight:
    """Which keys the queries may attend to. Padding has segment -1: it sees all that comes before, and only padding sees it."""

    causal: bool
    """Whether a query sees no later key."""
    pattern: Pattern = FULL
    """What of that is seen, by place."""
    segments: Tensor | None = None
    """Documents of the queries, int64 [B, S]; None = one document."""
    key_segments: Tensor | None = None
    """Documents of the keys, int64 [B, T]; None = those of the queries."""
    whole_segments: Tensor | None = None
    """Where the queries are a share of a sequence, the documents of all of it."""
    whole_keys: Tensor | None = None
    """There, too, the dropout keys of all of it, int32."""
    order: Tensor | None = None
    """Places of the queries in their whole sequence, int64 [B or 1, S], below 0 before its beginning; None = 0 to S - 1."""
    key_order: Tensor | None = None
    """Places of the keys, int64 [B or 1, T]; None = 0 to T - 1."""
    prefix: Tensor | None = None
    """Keys that are seen though they are later, bool [B, T]."""
    whole_prefix: Tensor | None = None
    """Those of the whole sequence, as `whole_segments`."""
    given: Tensor | None = None
    """bool [B or 1, 1, S, T] in place of all that."""
    relative: Tensor | None = None
    """What scores are biased with, by bucket of the distance, [buckets, N]; see `bias`."""
    furthest: int = 0
    """The distance at which the last of these buckets begins."""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """bool [B or 1, 1, S, T] of what may be seen; None = all, or with `causal` all but what is later, places being 0, 1, ..."""
        made: Tensor | None = self.remembered((queries, keys), lambda: self._mask(queries, keys, device))
        return made

    def remembered(self, name: Any, make: Callable[[], Any]) -> Any:
        """Something that all layers of a forward pass share, made once."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

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
        """By place alone, bool [B or 1, 1, S, T]."""
        everywhere = self.pattern == FULL and self.order is None and self.key_order is None
        if everywhere and not (self.causal and (self.segments is not None or self.prefix is not None)):
            return None
        of_queries, of_keys = self.places(queries, keys, device)
        query, key = of_queries[:, :, None], of_keys[:, None, :]
        near = self.pattern.sees(query, key) & ((key >= 0) | (query < 0))
        if self.causal:
            near = near & (key <= query if self.prefix is None else (key <= query) | self.prefix[:, None, :])
        return near.unsqueeze(1)

    def bias(self, queries: int, keys: int) -> Tensor | None:
        """What is added to scores, [B or 1, N, S, T], minus infinity where nothing is seen; None = there are no biases."""
        if self.relative is None:
            return None
        device = self.relative.device
        if self.order is None and self.key_order is None:
            bias = bias_by_distance(self.relative, self.causal, self.furthest, queries, keys)
        else:
            bias = bias_by_place(self.relative, self.causal, self.furthest, *self.places(queries, keys, device))
        mask = self.mask(queries, keys, device)
        if mask is None and self.causal:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def places(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of queries and keys, int64 [B or 1, S] and [B or 1, T]."""
        of_queries = torch.arange(queries, device=device)[None] if self.order is None else self.order
        return of_queries, torch.arange(keys, device=device)[None] if self.key_order is None else self.key_order

    def fall(self, slopes_N: Tensor, queries: int, keys: int) -> Tensor:
        """What is added to scores that fall with the distance, [B or 1, N, S, T], minus infinity where nothing is seen."""
        of_queries, of_keys = self.places(queries, keys, slopes_N.device)
        apart = of_keys[:, None, None, :] - of_queries[:, None, :, None]
        mask = self.mask(queries, keys, slopes_N.device)
        seen = apart <= 0 if mask is None and self.causal else mask
        fall = -slopes_N[:, None, None] * apart.abs()
        return fall if seen is None else fall.masked_fill(~seen, -torch.inf)

    def tiles(self, queries: int, keys: int, most_rows: int) -> tuple[Tiles, ...]:
        """Tiles to compute in place of all pairs of a query and a key; none where they would not be half the work."""
        others = (self.given, self.order, self.key_order, self.prefix, self.relative)
        if self.pattern == FULL or any(x is not None for x in others):
            return ()
        tiles = tiles_of(self.pattern, self.causal, (range(queries),), (range(keys),), most_rows)
        return tiles if 2 * sum(some.area for some in tiles) <= queries * keys else ()

    @cached_property
    def whole(self) -> Sight:
        """The sight of all queries of the sequence, of which these are a share."""
        return replace(self, segments=self.whole_segments, prefix=self.whole_prefix, order=None, _made={})

    @cached_property
    def full(self) -> Sight:
        """The same without the pattern."""
        return self if self.pattern == FULL else replace(self, pattern=FULL, _made={})
