"""Heads that predict tokens after the next one: a block each, beside the last block (Gloeckle et al. 2024)."""

from __future__ import annotations

from torch import nn

from teratron.config import ModelConfig
from teratron.models.blocks import Block, Head
from teratron.models.units import Shared, State

TRUNK = "trunk"
"""What the last block reads, and every head ahead as well, [B, S, H]."""
AHEAD = "ahead."
"""Prefix of what such a head has made, [B, S, H]; then comes how many places on its token is."""


class TrunkBlock(Block):
    """The last block, which keeps what it read for the heads. Generation, which has a cache, predicts the next token alone."""

    def forward(self, state: State, shared: Shared) -> State:
        trunk = {TRUNK: state["hidden"]} if shared.cache is None else {}
        return {**super().forward(state, shared), **trunk}


class MultiTokenHead(Head):
    """The head of the next token, and one for each token after it; all share the norm and the output projection."""

    def __init__(self, config: ModelConfig, tied_to: str, shared_weight: nn.Parameter | None) -> None:
        super().__init__(config, tied_to, shared_weight)
        places = range(2, config.predict_tokens + 1)
        self.ahead = nn.ModuleDict({str(n): Block(config, config.layers - 1, f"head.ahead.{n}") for n in places})

    def forward(self, state: State, shared: Shared) -> State:
        rest = {name: tensor for name, tensor in state.items() if name != TRUNK}
        made = super().forward(rest, shared)
        for place, block in self.ahead.items() if TRUNK in state else ():
            branch = block({**made, "hidden": state[TRUNK]}, shared)  # which may also add a router's terms
            made = {**branch, "hidden": made["hidden"], f"{AHEAD}{place}": super().forward(branch, shared)["hidden"]}
        return made
