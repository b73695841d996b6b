"""The XLNet family (Yang et al. 2019): tokens are predicted in any order, by two streams of attention; without the second, Transformer-XL.

A token's turn [B, S] is its place in the order in which tokens are predicted, from 1; those of turn 0 are given. Content knows what
has its turn no later, itself included; a query knows what has its turn before. Shape letters: `two_stream.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.blocks import Head, TokenEmbedding
from teratron.models.leaves import Embedding
from teratron.models.plan import EMBEDDING, HEAD, Cut, Layout, Plan, under
from teratron.models.two_stream import BLOCK, CONTENT, QUERIES, Streams, TwoStreamBlock, View, sinusoids
from teratron.models.units import Cache, Model, Shared, State

TARGET = "target_"
"""Prefix of what a batch holds of the predicted tokens, [B, P]: `target_positions` are their places in the sample."""
QUERY_SITE = 0x5BD1E995
"""Told apart by this, the two streams of a token drop different features."""
MEMORY, NEVER = -1, 2**62
"""Turns of what lies before a stretch, and before the sample."""


class TwoStreamEmbedding(TokenEmbedding):
    """Tokens to content; every query begins as one and the same vector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.query = Embedding(1, config.hidden, config.init_std)

    def forward(self, state: State, shared: Streams) -> State:  # type: ignore[override]
        state = super().forward(state, shared)
        if QUERIES not in shared.views:
            return state
        queries = self.query(torch.zeros_like(state[f"{TARGET}positions"]))
        return {**state, QUERIES: self.dropout(queries, shared.views[QUERIES].keys)}


class TwoStreamHead(Head):
    """Reads the queries where there are any."""

    def forward(self, state: State, shared: Shared) -> State:
        return super().forward({**state, "hidden": state.get(QUERIES, state[CONTENT])}, shared)


class XLNet(Model):
    """Units 0 (embedding), 1..layers (blocks), layers + 1 (head), or any range of them."""

    plan: ClassVar[Plan] = {
        **{f"embedding.{leaf}": EMBEDDING[leaf] for leaf in ("tokens", "norm", "dropout")},
        "embedding.query": Cut(Layout.WHOLE, Layout.RESIDUAL),
        **under("blocks.*", BLOCK),
        **{f"head.{leaf}": HEAD[leaf] for leaf in ("norm", "transform", "transform_norm", "classes", "output")},
    }
    streams: ClassVar = {"": False, TARGET: False}

    def __init__(self, config: ModelConfig, units: range | None = None) -> None:
        super().__init__(config)
        units = units if units is not None else range(config.layers + 2)
        self.embedding = TwoStreamEmbedding(config) if 0 in units else None
        layers = [n - 1 for n in units if 1 <= n <= config.layers]
        self.blocks = nn.ModuleDict({str(n): TwoStreamBlock(config, n, f"blocks.{n}") for n in layers})
        weight = self.embedding.tokens.weight if self.embedding is not None and config.ties_output else None
        self.head = TwoStreamHead(config, "embedding.tokens.weight", weight) if config.layers + 1 in units else None

    @classmethod
    def carried(cls, config: ModelConfig, unit: int) -> dict[str, str]:
        return {CONTENT: "", QUERIES: TARGET} if unit else {}

    def units(self) -> list[nn.Module]:
        return [unit for unit in (self.embedding, *self.blocks.values(), self.head) if unit is not None]

    def forward(self, state: State, mask: Tensor | None = None, cache: Cache | None = None) -> State:
        """The state has the usual coordinates and `turns`; without these, tokens take turns from left to right.

        With `target_positions` there are queries, and the last state's hidden features are theirs, [B, P, H].
        """
        shared = self.views(state)
        for unit in self.units():
            state = unit(state, shared)
        return state

    def views(self, state: State) -> Streams:
        """What each stream sees, from the coordinates."""
        base, documents = self.shared(state, "", None), state.get("segments")
        length, device = base.positions.shape[1], base.positions.device
        stretches = length // self.config.recurrence if self.config.recurrence else 1
        own, seen = length // stretches, length // stretches * min(stretches, 2)
        distances = sinusoids(own + seen - 1, 1 - own, self.config.hidden, next(self.parameters()).dtype, device)
        shared = Streams(base.positions, None, base.sight, base.keys, distances_1ZH=distances, stretches=stretches)

        places = torch.arange(length, device=device).expand(base.positions.shape)
        turns = state.get("turns", places + 1)
        content = _Content(shared, turns, documents)
        views = {CONTENT: content.view(places, turns, documents, base.keys)}
        if f"{TARGET}positions" in state:
            targets, keys = state[f"{TARGET}positions"], state.get(f"{TARGET}keys")
            before = turns.gather(1, targets) - 1
            views[QUERIES] = content.view(targets, before, state.get(f"{TARGET}segments"), None if keys is None else keys ^ QUERY_SITE)
        return replace(shared, views=views)


class _Content:
    """What there is to be seen: the rule on coordinates."""

    def __init__(self, shared: Streams, turns_BS: Tensor, documents_BS: Tensor | None) -> None:
        self.shared, self.own = shared, turns_BS.shape[1] // shared.stretches
        self.turns_NT = self._seen(turns_BS, torch.full_like(turns_BS, MEMORY), NEVER)
        self.documents_NT = None if documents_BS is None else self._seen(documents_BS, documents_BS, NEVER)

    def _seen(self, x_BS: Tensor, past_BS: Tensor, nothing: int) -> Tensor:
        return x_BS if self.shared.stretches == 1 else self.shared.with_memory(x_BS, past_BS, nothing)

    def view(self, places: Tensor, turns: Tensor, documents: Tensor | None, keys: Tensor | None) -> View:
        """Of tokens at these places of the sample that know what has its turn no later than this, in their document."""
        places, turns = self.shared.folded(places), self.shared.folded(turns)
        seen = self.turns_NT[:, None, :] <= turns[:, :, None]
        if documents is not None and self.documents_NT is not None:
            seen = seen & (self.documents_NT[:, None, :] == self.shared.folded(documents)[:, :, None])
        count = self.turns_NT.shape[1]
        distances = places[:, :, None] % self.own + count - 1 - torch.arange(count, device=places.device)  # the first is 1 - own
        return View(seen.unsqueeze(1), distances.unsqueeze(1), keys)
