"""The decoder-only (GPT) and encoder-only (BERT) families: one stream of tokens through a stack of blocks, described by config."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.blocks import Block, Head, TokenEmbedding
from teratron.models.multi_token import TRUNK, MultiTokenHead, TrunkBlock
from teratron.models.plan import EMBEDDING, HEAD, Plan, block_plan, under
from teratron.models.units import Cache, Model, State


class GPT(Model):
    """Units 0 (embedding), 1..layers (blocks), layers + 1 (head), or any range of them. Attention is causal."""

    plan: ClassVar[Plan] = {
        **under("embedding", EMBEDDING),
        **block_plan("blocks.*"),
        **under("head", HEAD),
        **block_plan("head.ahead.*"),
    }

    def __init__(self, config: ModelConfig, units: range | None = None) -> None:
        super().__init__(config)
        units = units if units is not None else range(config.layers + 2)
        self.embedding = TokenEmbedding(config) if 0 in units else None
        layers = [n - 1 for n in units if 1 <= n <= config.layers]
        ahead, last = config.predict_tokens > 1, config.layers - 1
        kinds = {n: TrunkBlock if ahead and n == last else Block for n in layers}
        self.blocks = nn.ModuleDict({str(n): kind(config, n, f"blocks.{n}") for n, kind in kinds.items()})
        shared = self.embedding.tokens.weight if self.embedding is not None and config.ties_output else None
        head = MultiTokenHead if ahead else Head
        self.head = head(config, "embedding.tokens.weight", shared) if config.layers + 1 in units else None

    @classmethod
    def carried(cls, config: ModelConfig, unit: int) -> dict[str, str]:
        trunk = {TRUNK: ""} if config.predict_tokens > 1 and unit == config.layers + 1 else {}
        return super().carried(config, unit) | trunk

    def units(self) -> list[nn.Module]:
        return [unit for unit in (self.embedding, *self.blocks.values(), self.head) if unit is not None]

    def forward(self, state: State, mask: Tensor | None = None, cache: Cache | None = None) -> State:
        shared = self.shared(state, "", mask, cache)
        state = self.sent(state)
        for unit in self.units():
            state = unit(state, shared)
        return state


class Encoder(GPT):
    """The same stack with attention in both directions (BERT, Devlin et al. 2019; RoBERTa, Liu et al. 2019)."""

    streams: ClassVar = {"": False}
