"""What every family is: ordered units from state to state, cut anywhere between two units (contract C5).

Shape letters: see `leaves.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.leaves import accurate
from teratron.models.patterns import pattern_of
from teratron.models.plan import Plan
from teratron.models.positions import rotary, rotary_in_window
from teratron.models.random import mask_keys
from teratron.models.relative import RELATIVE
from teratron.models.sight import Sight

State = dict[str, Tensor]
COORDINATES = ("positions", "segments", "keys", "real", "order", "prefix", "whole_segments", "whole_keys", "whole_prefix")
"""What every rank knows of a batch by itself and is never sent; a second stream's have its name in front.

The last three are there when the sequence is cut over context ranks: the segments, keys and prefix of all of it. `order` [B, S] are
the tokens' places where these are not 0 to S - 1, as when text is generated; those below 0 are padding. `prefix`, bool [B, S], marks
tokens that all see, also those before them.
"""
TERM, LOAD = "term.", "load."
"""Prefixes of what blocks leave in a state for the loop: sums of loss terms, and routers' choices. It stays on its stage, never sent."""


class Cache(Protocol):
    """Keys and values of the tokens seen so far, one pair a layer."""

    def append(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Sight]:
        """Add the new tokens' keys and values of a layer; return those that they may see, [B, K, T, D], and which of them they do."""

    def memory(self, layer: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's memory for a layer, [B, K, T, D] each, which `make` computes where they are not known."""


@dataclass(frozen=True)
class Shared:
    """What all units of one stream use in a forward pass; derived from the batch's coordinates on every stage, never sent."""

    positions: Tensor
    """int64 [B, S]."""
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin [B, 1, S, rotated features / 2], or None."""
    sight: Sight
    """What self-attention may see."""
    keys: Tensor | None
    """Dropout keys int32 [B, S], or None = no dropout."""
    cache: Cache | None = None
    memory_sight: Sight | None = None
    """What attention to the encoder's memory may see."""
    real: Tensor | None = None
    """bool [B, S]: False at padding; None = no padding."""
    relative: Tensor | None = None
    """Biases of scores by the bucket of the distance, [buckets, N], which blocks take from the state."""
    rotary_in_window: tuple[Tensor, Tensor] | None = None
    """In place of `rotary` where attention has a window."""


class Model(nn.Module):
    """Base of the families: units by global number, or any range of them. Parameters are uninitialised, see `parts.initialise`."""

    plan: ClassVar[Plan]
    """How its leaves may be cut."""
    streams: ClassVar[Mapping[str, bool]] = {"": True}
    """Its token streams by the prefix of their tensors' names in a batch, and whether attention in them is causal."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head: Any = None

    def units(self) -> list[nn.Module]:
        """The units of this range in order."""
        raise NotImplementedError

    @classmethod
    def count_units(cls, config: ModelConfig) -> int:
        """Units of a whole model."""
        return config.layers + 2

    @classmethod
    def table_units(cls, config: ModelConfig) -> tuple[int, ...]:
        """The units that use the first one's table of tokens, itself among them."""
        return (0, config.layers + 1) if config.ties_output else (0,)

    @classmethod
    def carried(cls, config: ModelConfig, unit: int) -> dict[str, str]:
        """What is sent to a stage that begins with a unit: names of tensors [B, S, hidden], and the stream whose length each has.

        `RELATIVE` is no such tensor: see `relative_shape`.
        """
        return {"hidden": "", **cls.biases(config)} if unit else {}

    @classmethod
    def biases(cls, config: ModelConfig) -> dict[str, str]:
        """The biases of relative positions among what is sent, where a model has them."""
        return {RELATIVE: ""} if config.position == "relative" else {}

    def forward(self, state: State, mask: Tensor | None = None, cache: Cache | None = None) -> State:
        """Run the units in order; the result holds what the next stage needs to be sent, such as hidden [B, S, H].

        Args:
            state: what the stage before sent (tokens [B, S] for the first unit), and this rank's own coordinates: positions
                [B, S]; segments [B, S] when documents are isolated; keys [B, S] (see `with_dropout`) when features are dropped.
            mask: bool [B, 1, S, T] of what may be seen, in place of what follows from segments.
            cache: keys and values of earlier tokens.
        """
        raise NotImplementedError

    def shared(self, state: State, stream: str, mask: Tensor | None, cache: Cache | None = None) -> Shared:
        """What the units of a stream share."""
        mine = {name: state.get(f"{stream}{name}") for name in COORDINATES}
        sight = Sight(
            self.streams[stream],
            pattern_of(self.config),
            segments=mine["segments"],
            whole_segments=mine["whole_segments"],
            whole_keys=mine["whole_keys"],
            order=mine["order"],
            prefix=mine["prefix"],
            whole_prefix=mine["whole_prefix"],
            given=mask,
            furthest=self.config.relative_distance,
        )
        positions, weight = state[f"{stream}positions"], next(self.parameters(), None)
        kind = accurate(weight.dtype) if weight is not None else None  # a head may have no weights
        turned, near = (f(self.config, positions, kind) if kind is not None else None for f in (rotary, rotary_in_window))
        return Shared(positions, turned, sight, mine["keys"], cache, real=real_tokens(state, stream), rotary_in_window=near)

    def sent(self, state: State) -> State:
        """A state without the coordinates."""
        own = {f"{stream}{name}" for stream in self.streams for name in COORDINATES}
        return {name: tensor for name, tensor in state.items() if name not in own}


def real_tokens(tensors: Mapping[str, Tensor], stream: str) -> Tensor | None:
    """Which tokens of a stream of a state or batch are no padding, bool [B, S]; None = all."""
    real, segments = tensors.get(f"{stream}real"), tensors.get(f"{stream}segments")
    if segments is None or real is None:
        return real if segments is None else segments >= 0
    return real & (segments >= 0)


def with_routing(state: State, router: str, terms: Mapping[str, Tensor], load_E: Tensor) -> State:
    """A state to which a router, named by its path, has added its loss terms' sums and its choices."""
    sums = {f"{TERM}{name}": state[f"{TERM}{name}"] + term if f"{TERM}{name}" in state else term for name, term in terms.items()}
    return {**state, **sums, f"{LOAD}{router}": load_E}


def with_dropout(state: State, streams: Mapping[str, bool], seed: int, step: int, sample: Tensor) -> State:
    """A state with the dropout keys of every stream that it has; sample [B] are global sample indices."""
    found = [stream for stream in streams if f"{stream}positions" in state]
    return state | {f"{s}keys": mask_keys(seed, step, sample, state[f"{s}positions"], state.get(f"{s}segments")) for s in found}
