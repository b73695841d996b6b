"""What a pipeline schedule is made of: actions, listed per rank. Plain data that is run, checked, simulated and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple


class Kind(Enum):
    """What a rank does in one action."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of inputs and weights at once."""
    BACKWARD_INPUT = "I"
    """Gradients of the inputs alone: all that the stage before waits for."""
    BACKWARD_WEIGHT = "W"
    """Gradients of the weights, after those of the inputs."""
    OVERLAP = "FB"
    """A forward and a backward of different micro-batches at once, so that one computes while the other communicates."""
    SEND_STATE = "send state"
    RECEIVE_STATE = "receive state"
    SEND_GRADIENT = "send gradient"
    RECEIVE_GRADIENT = "receive gradient"


SENDS = frozenset({Kind.SEND_STATE, Kind.SEND_GRADIENT})
RECEIVES = frozenset({Kind.RECEIVE_STATE, Kind.RECEIVE_GRADIENT})
BACKWARDS = frozenset({Kind.BACKWARD, Kind.BACKWARD_INPUT})
"""What yields the gradient of a stage's inputs."""
_WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward of the inputs",
    Kind.BACKWARD_WEIGHT: "backward of the weights",
    Kind.SEND_STATE: "send of the state",
    Kind.RECEIVE_STATE: "receive of the state",
    Kind.SEND_GRADIENT: "send of the gradient",
    Kind.RECEIVE_GRADIENT: "receive of the gradient",
}


class Message(NamedTuple):
    """What travels between stages: a state forwards, or a gradient backwards."""

    gradient: bool
    stage: int
    """The stage that makes it."""
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's list."""

    kind: Kind
    stage: int
    """Global stage, 0 to stages - 1; of a send the stage that makes the message, of a receive the one that uses it."""
    micro_batch: int
    peer: int = -1
    """Of a send or receive: the other rank."""
    parts: tuple[Action, ...] = ()
    """Of an overlap: the forward and the backward. Its stage and micro-batch are those of the forward."""

    @property
    def computations(self) -> tuple[Action, ...]:
        """The forwards and backwards in this action: itself, an overlap's parts, or none for a send or receive."""
        return self.parts or (() if self.peer >= 0 else (self,))

    @property
    def message(self) -> Message:
        """What a send or receive carries; equal on both sides."""
        maker = self.stage - (self.kind is Kind.RECEIVE_STATE) + (self.kind is Kind.RECEIVE_GRADIENT)
        return Message(self.kind in (Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT), maker, self.micro_batch)

    @property
    def words(self) -> str:
        """Without the other rank."""
        return f"{_WORDS[self.kind]} of micro-batch {self.micro_batch} in stage {self.stage}"

    def __str__(self) -> str:
        if self.parts:
            return " with ".join(map(str, self.parts))
        return self.words + ("" if self.peer < 0 else f" {'to' if self.kind in SENDS else 'from'} rank {self.peer}")


Orders = tuple[tuple[Action, ...], ...]
"""Each rank's actions, in the order in which it performs them."""


@dataclass(frozen=True)
class Schedule:
    """Who does what, in which order, in one step of a pipeline.

    A rank performs its actions in list order. Sends never wait; a receive waits for its message. Between two ranks, messages in
    one direction are received in the order in which they are sent, so that one communicator per direction needs no tags.
    """

    name: str
    placement: tuple[tuple[int, ...], ...]
    """The global stages of each rank; a rank's chunks, in this order."""
    micro_batches: int
    actions: Orders

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.placement)

    @property
    def chunks(self) -> int:
        """Stages that each rank holds."""
        return len(self.placement[0])

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.ranks * self.chunks

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank that holds each stage."""
        held = {stage: rank for rank, stages in enumerate(self.placement) for stage in stages}
        return tuple(held[stage] for stage in range(self.stages))
