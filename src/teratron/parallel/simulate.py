"""Pipeline schedules played without processes: how long each action takes, how much of the time is idle, how much memory is held."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from teratron.parallel.schedule_actions import SENDS, Action, Kind, Message, Schedule

Cost = float | Sequence[float]
"""Time that a rank spends on one micro-batch over all its chunks, shared equally by them; or the time of each global stage."""


class ScheduleError(ValueError):
    """A schedule that cannot be run, in a sentence that names the rank and the action."""


class Span(NamedTuple):
    """An action in time: a send takes none, a receive as long as it waits."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each rank does what, from time 0."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    """Each rank's actions in order."""

    def computing(self, rank: int) -> list[Span]:
        """The spans in which a rank computes."""
        return [span for span in self.spans[rank] if span.action.computations]

    @property
    def cost(self) -> float:
        """Time of a step: the longest that any rank takes from its first start to its last end."""
        ranks = [self.computing(rank) for rank in range(self.schedule.ranks)]
        return max(spans[-1].end - spans[0].start for spans in ranks)

    @property
    def end(self) -> float:
        """When the last rank is done."""
        return max(self.computing(rank)[-1].end for rank in range(self.schedule.ranks))

    @property
    def bubble(self) -> float:
        """Idle share of the ranks' time: (cost - time that a rank computes, on average) / cost. Stages that differ count as idle too."""
        busy = sum(span.end - span.start for rank in range(self.schedule.ranks) for span in self.computing(rank))
        return 1 - busy / self.schedule.ranks / self.cost


def simulate(
    schedule: Schedule,
    forward: Cost = 1.0,
    backward_input: Cost = 1.0,
    backward_weight: Cost = 1.0,
    send: float = 0.0,
) -> Timeline:
    """Play a schedule. A full backward takes `backward_input + backward_weight`, an overlap the sum of its parts.

    A message arrives `send` after it was made; meanwhile both ranks may compute. All times are in one unit, whichever.
    Raises ScheduleError for a deadlock, with what each rank waits for.
    """
    duration = _durations(schedule, forward, backward_input, backward_weight)
    spans: list[list[Span]] = [[] for _ in schedule.actions]
    arrival: dict[Message, float] = {}
    waiting: dict[Message, int] = {}
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        while len(spans[rank]) < len(schedule.actions[rank]):
            action = schedule.actions[rank][len(spans[rank])]
            start = spans[rank][-1].end if spans[rank] else 0.0
            end = start
            if action.peer < 0:
                end += duration(action)
            elif action.kind in SENDS:
                message = action.message
                arrival[message] = start + send
                if message in waiting:
                    ready.append(waiting.pop(message))
            else:
                message = action.message
                if message not in arrival:
                    waiting[message] = rank
                    break
                end = max(start, arrival[message])
            spans[rank].append(Span(action, start, end))
    if waiting:
        raise ScheduleError(_deadlock(schedule, [len(done) for done in spans]))
    return Timeline(schedule, tuple(map(tuple, spans)))


def _durations(schedule: Schedule, forward: Cost, backward_input: Cost, backward_weight: Cost) -> Callable[[Action], float]:
    """The time of each forward, backward and overlap."""
    ahead, inputs, weights = (
        [cost / schedule.chunks] * schedule.stages if isinstance(cost, (int, float)) else list(cost)
        for cost in (forward, backward_input, backward_weight)
    )
    for costs in (ahead, inputs, weights):
        if len(costs) != schedule.stages:
            raise ValueError(f"{len(costs)} costs for {schedule.stages} stages")
    by_kind = {
        Kind.FORWARD: ahead,
        Kind.BACKWARD: [one + other for one, other in zip(inputs, weights, strict=True)],
        Kind.BACKWARD_INPUT: inputs,
        Kind.BACKWARD_WEIGHT: weights,
    }
    return lambda action: sum(by_kind[part.kind][part.stage] for part in action.computations)


def _deadlock(schedule: Schedule, done: Sequence[int]) -> str:
    states = [
        f"rank {rank} waits at action {position} for the {actions[position]}" if position < len(actions) else f"rank {rank} has finished"
        for rank, (actions, position) in enumerate(zip(schedule.actions, done, strict=True))
    ]
    return f"schedule '{schedule.name}' would wait for ever: {'; '.join(states)}"


def peak_activations(schedule: Schedule, weights: Sequence[float] | None = None) -> list[float]:
    """The most that each rank holds at once of what its forwards keep for their backwards, in micro-batches of a rank's whole share.

    A stage's forward adds its weight (default: 1 / chunks each); the full backward, or the backward of the weights, takes it away.
    Weights in bytes give bytes. In an overlap both are held.
    """
    amounts = [1.0] * schedule.stages if weights is None else weights
    share = schedule.chunks if weights is None else 1
    return [_peak(actions, amounts) / share for actions in schedule.actions]


def _peak(actions: Sequence[Action], amounts: Sequence[float]) -> float:
    held = peak = 0.0
    for action in actions:
        for part in action.computations:  # an overlap's forward comes first
            if part.kind is Kind.FORWARD:
                held += amounts[part.stage]
                peak = max(peak, held)
            elif part.kind is not Kind.BACKWARD_INPUT:
                held -= amounts[part.stage]
    return peak
