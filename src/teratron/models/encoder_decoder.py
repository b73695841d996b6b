"""The encoder-decoder family (T5, BART): an encoder reads one stream of tokens, a decoder writes another and attends to the first."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.blocks import Block, Head, TokenEmbedding, block_norm
from teratron.models.leaves import Embedding
from teratron.models.patterns import FULL
from teratron.models.plan import EMBEDDING, HEAD, RESIDUAL_NORM, Plan, block_plan, under
from teratron.models.sight import Sight
from teratron.models.units import Cache, Model, Shared, State


class Bridge(nn.Module):
    """Between the two stacks: the encoder's output becomes the memory, the decoder's tokens the hidden features."""

    def __init__(self, config: ModelConfig, table: Embedding | None) -> None:
        super().__init__()
        self.norm = block_norm(config) if config.norm_place == "pre" else None
        self.embedding = TokenEmbedding(config, "bridge.embedding", table=table, name="/embedding.tokens.weight")

    def forward(self, state: State, shared: Shared) -> State:
        memory = state["hidden"] if self.norm is None else self.norm(state["hidden"])
        return self.embedding({**state, "memory": memory}, shared)


class EncoderDecoder(Model):
    """Units 0 (encoder embedding), the encoder's blocks, the bridge, the decoder's blocks, and the head; layers of each kind.

    Both stacks have one table of tokens, and with tied embeddings so has the head.
    The batch has `encoder_tokens`, `encoder_positions` ... beside the decoder's `tokens`, `positions` ...
    """

    plan: ClassVar[Plan] = {
        **under("embedding", EMBEDDING),
        **block_plan("encoder.*"),
        "bridge.norm": RESIDUAL_NORM,
        **under("bridge.embedding", EMBEDDING),
        **block_plan("decoder.*", cross=True),
        **under("head", HEAD),
    }
    streams: ClassVar = {"": True, "encoder_": False}

    def __init__(self, config: ModelConfig, units: range | None = None) -> None:
        super().__init__(config)
        layers, units = config.layers, units if units is not None else range(2 * config.layers + 3)
        self.embedding = TokenEmbedding(config, reads="encoder_tokens") if 0 in units else None
        numbers = [n - 1 for n in units if 1 <= n <= layers]
        self.encoder = nn.ModuleDict({str(n): Block(config, n, f"encoder.{n}") for n in numbers})
        table = self.embedding.tokens if self.embedding is not None else None
        self.bridge = Bridge(config, table) if layers + 1 in units else None
        numbers = [n - layers - 2 for n in units if layers + 2 <= n <= 2 * layers + 1]
        self.decoder = nn.ModuleDict({str(n): Block(config, n, f"decoder.{n}", cross=True) for n in numbers})
        if table is None and self.bridge is not None:
            table = self.bridge.embedding.tokens
        weight = table.weight if table is not None and config.ties_output else None
        self.head = Head(config, "embedding.tokens.weight", weight) if 2 * layers + 2 in units else None

    @classmethod
    def count_units(cls, config: ModelConfig) -> int:
        return 2 * config.layers + 3

    @classmethod
    def table_units(cls, config: ModelConfig) -> tuple[int, ...]:
        return (0, config.layers + 1, *((2 * config.layers + 2,) if config.ties_output else ()))

    @classmethod
    def carried(cls, config: ModelConfig, unit: int) -> dict[str, str]:
        if unit > config.layers + 1:
            return {"hidden": "", "memory": "encoder_", **cls.biases(config)}
        return {"hidden": "encoder_", **cls.biases(config)} if unit else {}

    def units(self) -> list[nn.Module]:
        every = (self.embedding, *self.encoder.values(), self.bridge, *self.decoder.values(), self.head)
        return [unit for unit in every if unit is not None]

    def halves(self) -> tuple[EncoderDecoder, EncoderDecoder]:
        """A whole model as two stages with its weights: the encoder, and from the bridge on what writes."""
        reader, writer = copy.copy(self), copy.copy(self)
        none = nn.ModuleDict()
        reader._modules = self._modules | {"bridge": None, "decoder": none, "head": None}
        writer._modules = self._modules | {"embedding": None, "encoder": none}
        return reader, writer

    def forward(self, state: State, mask: Tensor | None = None, cache: Cache | None = None) -> State:
        state = both_segments(state, self.streams)
        reading = self.shared(state, "encoder_", None)
        writing = self.shared(state, "", mask, cache)
        writing = replace(writing, memory_sight=_memory_sight(writing.sight, reading.sight))
        state = self.sent(state)
        encoder = {id(unit) for unit in (self.embedding, *self.encoder.values())}
        for unit in self.units():
            state = unit(state, reading if id(unit) in encoder else writing)
        return state


def both_segments(tensors: State, streams: Iterable[str]) -> State:
    """With documents in one of the streams, another is one document, the first."""
    here = [stream for stream in streams if f"{stream}positions" in tensors]
    without = [stream for stream in here if f"{stream}segments" not in tensors]
    if len(without) == len(here):
        return tensors
    return tensors | {f"{stream}segments": torch.zeros_like(tensors[f"{stream}positions"]) for stream in without}


def _memory_sight(writing: Sight, reading: Sight) -> Sight:
    """The decoder sees all of the memory, or what belongs to the same document."""
    keys = reading.whole_segments if reading.whole_segments is not None else reading.segments
    return replace(writing, causal=False, pattern=FULL, given=None, prefix=None, key_segments=keys, _made={})
