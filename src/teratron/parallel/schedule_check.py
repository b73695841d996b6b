"""Is a pipeline schedule complete, in order, and free of deadlock: found out without processes."""

from __future__ import annotations

from collections import defaultdict
from itertools import zip_longest

from teratron.parallel.schedule_actions import RECEIVES, SENDS, Action, Kind, Message, Schedule
from teratron.parallel.simulate import ScheduleError, simulate

Fact = tuple[str, int, int]
"""What is there on a rank: (what, stage, micro-batch)."""

_NEEDS = {
    Kind.FORWARD: ["input"],
    Kind.BACKWARD: ["output", "gradient"],
    Kind.BACKWARD_INPUT: ["output", "gradient"],
    Kind.BACKWARD_WEIGHT: ["input gradient"],
    Kind.SEND_STATE: ["output"],
    Kind.SEND_GRADIENT: ["input gradient"],
    Kind.RECEIVE_STATE: [],
    Kind.RECEIVE_GRADIENT: [],
}
_MAKES = {
    Kind.FORWARD: ["output"],
    Kind.BACKWARD: ["input gradient", "weight gradient"],
    Kind.BACKWARD_INPUT: ["input gradient"],
    Kind.BACKWARD_WEIGHT: ["weight gradient"],
    Kind.SEND_STATE: ["sent state"],
    Kind.SEND_GRADIENT: ["sent gradient"],
    Kind.RECEIVE_STATE: ["input"],
    Kind.RECEIVE_GRADIENT: ["gradient"],
}


def check(schedule: Schedule) -> None:
    """Refuse a schedule that is incomplete, out of order, on the wrong rank, or that would wait for ever.

    Every stage takes every micro-batch forwards once and backwards once (whole, or inputs and then weights), on its own rank, after
    what it needs; in each direction between two ranks messages are received in the order in which they are sent, all of them; no
    rank waits for ever. Raises ScheduleError, a sentence that names the rank and the action.
    """
    held = sorted(stage for stages in schedule.placement for stage in stages)
    if held != list(range(schedule.stages)) or len(schedule.actions) != schedule.ranks:
        raise ScheduleError(f"schedule '{schedule.name}' does not place each of its stages on one rank: {schedule.placement}")
    for rank in range(schedule.ranks):
        _check_rank(schedule, rank)
    _check_messages(schedule)
    simulate(schedule)


def _check_rank(schedule: Schedule, rank: int) -> None:
    """Each action of a rank finds what it needs, does nothing twice, and nothing is left undone."""
    have: set[Fact] = set()
    for position, action in enumerate(schedule.actions[rank]):
        parts = action.parts or (action,)
        problems = [_obstacle(part, schedule, rank, have) for part in parts]  # an overlap's parts do not wait for each other
        for part in parts:
            made = {(what, part.stage, part.micro_batch) for what in _MAKES[part.kind]}
            problems += [f"makes the {what} a second time" for what, *_ in sorted(made & have)]
            have |= made
        for problem in filter(None, problems):
            raise ScheduleError(f"schedule '{schedule.name}': rank {rank}, action {position}, {action}: {problem}")
    for stage in schedule.placement[rank]:
        for micro_batch in range(schedule.micro_batches):
            if ("weight gradient", stage, micro_batch) not in have:
                raise ScheduleError(
                    f"schedule '{schedule.name}': rank {rank} never finishes the backward of micro-batch {micro_batch} in stage {stage}"
                )


def _obstacle(part: Action, schedule: Schedule, rank: int, have: set[Fact]) -> str | None:
    """Why an action cannot be done with what the rank has, or None."""
    if part.stage not in schedule.placement[rank]:
        return f"the stages of this rank are {', '.join(map(str, schedule.placement[rank]))}"
    if not 0 <= part.micro_batch < schedule.micro_batches:
        return f"the micro-batches are 0 to {schedule.micro_batches - 1}"
    there = {(what, part.stage, part.micro_batch) for what in _NEEDS[part.kind]} & have
    if part.stage == 0 or ("output", part.stage - 1, part.micro_batch) in have:
        there.add(("input", part.stage, part.micro_batch))
    if part.stage == schedule.stages - 1 or ("input gradient", part.stage + 1, part.micro_batch) in have:
        there.add(("gradient", part.stage, part.micro_batch))
    missing = [what for what in _NEEDS[part.kind] if (what, part.stage, part.micro_batch) not in there]
    return f"the {missing[0]} that it needs is not there yet" if missing else None


def _check_messages(schedule: Schedule) -> None:
    """In each direction between two ranks, the messages received are those sent, in the same order."""
    sent: dict[tuple[int, int], list[Message]] = defaultdict(list)
    received: dict[tuple[int, int], list[Message]] = defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind in SENDS:
                sent[rank, action.peer].append(action.message)
            elif action.kind in RECEIVES:
                received[action.peer, rank].append(action.message)
    for source, target in sorted(sent.keys() | received.keys()):
        for number, (one, other) in enumerate(zip_longest(sent[source, target], received[source, target])):
            if one != other:
                raise ScheduleError(
                    f"schedule '{schedule.name}': message {number} from rank {source} to rank {target} is sent as {_describe(one)} "
                    f"but received as {_describe(other)}"
                )


def _describe(message: Message | None) -> str:
    if message is None:
        return "nothing"
    return f"the {'gradient' if message.gradient else 'state'} of micro-batch {message.micro_batch} from stage {message.stage}"
