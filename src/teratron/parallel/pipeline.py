"""The runtime of pipelines: executes any schedule, action by action; what stages compute it is told by two functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from teratron.models import State
from teratron.parallel.mesh import Group, Mesh, Pending
from teratron.parallel.schedule_actions import RECEIVES, SENDS, Action, Kind, Message, Schedule


class Work(Protocol):
    """What the stages of one step do. A message is the tensors that pass between two stages."""

    def received(self, stage: int, micro_batch: int) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what a stage is sent for a micro-batch, in the order in which it is sent."""

    def forward(self, stage: int, micro_batch: int, received: State) -> State:
        """Run a stage; what it returns is sent on."""

    def backward(self, stage: int, micro_batch: int, gradients: State, split: bool) -> State:
        """Gradients of what was received, from those of what was sent; split: without those of the weights, as far as they can wait."""

    def backward_weights(self, stage: int, micro_batch: int) -> None:
        """The gradients that were put off."""


@dataclass(frozen=True)
class Channels:
    """Two groups of the pipeline's ranks, so that messages up and down do not wait for each other."""

    down: Group
    up: Group

    @classmethod
    def of(cls, mesh: Mesh) -> Channels:
        return cls(mesh.group("pipeline"), mesh.another("pipeline"))

    def towards(self, peer: int, sending: bool) -> Group:
        """The group for a message to or from a rank of the pipeline."""
        return self.down if (peer > self.down.rank) == sending else self.up


class Runtime:
    """Runs one rank's list of a schedule."""

    def __init__(self, schedule: Schedule, channels: Channels, dtype: torch.dtype, device: torch.device) -> None:
        self.schedule, self.channels, self.dtype, self.device = schedule, channels, dtype, device
        self.actions = schedule.actions[channels.down.rank]

    def run(self, work: Work, forward_only: bool = False) -> None:
        """All actions of one step; forward_only: leave out whatever belongs to gradients, as in an evaluation."""
        self.work, self.here, self.sends = work, dict[Message, State](), list[Pending]()
        doing = self.channels.down.doing
        for action in self.actions:
            for part in action.parts or (action,):
                if not forward_only or _is_forward(part):
                    doing.say(part.words)
                    self._perform(part)
        doing.say("end of the passes")
        for pending in self.sends:
            pending.wait()
        doing.say("")

    def _perform(self, action: Action) -> None:
        stage, batch = action.stage, action.micro_batch
        if action.kind in SENDS:
            self._send(action)
        elif action.kind in RECEIVES:
            self._receive(action)
        elif action.kind is Kind.FORWARD:
            sent = self.work.forward(stage, batch, self.here.pop(Message(False, stage - 1, batch), {}))
            self.here[Message(False, stage, batch)] = sent
        elif action.kind is Kind.BACKWARD_WEIGHT:
            self.work.backward_weights(stage, batch)
        else:
            gradients = self.here.pop(Message(True, stage + 1, batch), {})
            made = self.work.backward(stage, batch, gradients, action.kind is Kind.BACKWARD_INPUT)
            self.here[Message(True, stage, batch)] = made

    def _send(self, action: Action) -> None:
        group = self.channels.towards(action.peer, True)
        for tensor in self.here.pop(action.message).values():
            self.sends.append(group.send(tensor.detach().contiguous(), action.peer))

    def _receive(self, action: Action) -> None:
        message = action.message
        stage = message.stage if message.gradient else message.stage + 1  # a gradient is shaped like what its maker was sent
        shapes = self.work.received(stage, message.micro_batch)
        group = self.channels.towards(action.peer, False)
        tensors = {name: torch.empty(shape, dtype=self.dtype, device=self.device) for name, shape in shapes.items()}
        for pending in [group.receive(tensor, action.peer) for tensor in tensors.values()]:
            pending.wait()
        self.here[message] = tensors


def _is_forward(action: Action) -> bool:
    return action.kind in (Kind.FORWARD, Kind.SEND_STATE, Kind.RECEIVE_STATE)
