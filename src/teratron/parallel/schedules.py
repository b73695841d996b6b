"""Pipeline schedules as data: from (name, ranks, micro-batches, chunks) to each rank's list of actions, sends and receives included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from teratron.config import UserError
from teratron.config.errors import nearest
from teratron.parallel import schedule_orders as orders
from teratron.parallel.schedule_actions import BACKWARDS, Action, Kind, Orders, Schedule


@dataclass(frozen=True)
class Recipe:
    """How a schedule is made, and how many chunks it needs."""

    words: Callable[[int, int, int, int], list[str]]
    """(rank, ranks, micro-batches, chunks) to that rank's words, see `schedule_orders`."""
    least_chunks: int = 1
    most_chunks: int | None = 1
    fold: bool = False
    """Whether stages go down the ranks and up again (a V), instead of round and round."""

    def allows(self, chunks: int) -> bool:
        """Whether the schedule can be made with so many chunks a rank."""
        return chunks >= self.least_chunks and (self.most_chunks is None or chunks <= self.most_chunks)


SCHEDULES = {
    "gpipe": Recipe(orders.gpipe),
    "1f1b": Recipe(orders.one_forward_one_backward),
    "interleaved": Recipe(orders.interleaved, 2, None),
    "zb-h1": Recipe(orders.zb_h1),
    "zb-h2": Recipe(orders.zb_h2),
    "zbv": Recipe(orders.zbv, 2, 2, fold=True),
    "dualpipev": Recipe(orders.dualpipev, 2, 2, fold=True),
}
"""By the name in `parallel.schedule`."""


def build_schedule(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """The schedule of one step: every micro-batch forwards and backwards through `ranks * chunks` stages.

    Any number of micro-batches from 1 will do; few of them make a large bubble. Raises UserError for a name that does not exist or
    chunks that the schedule cannot have.
    """
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"a schedule needs ranks and micro-batches, not {ranks} and {micro_batches}")
    held = placement(name, ranks, chunks)
    words = SCHEDULES[name].words
    numbered = [orders.number(words(rank, ranks, micro_batches, chunks), held[rank], micro_batches) for rank in range(ranks)]
    return Schedule(name, held, micro_batches, add_communication(numbered, held))


def placement(name: str, ranks: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """The global stages that each rank holds. Raises UserError as `build_schedule` does."""
    recipe = _recipe(name, chunks)
    if recipe.fold:
        return tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    return tuple(tuple(range(rank, ranks * chunks, ranks)) for rank in range(ranks))


def _recipe(name: str, chunks: int) -> Recipe:
    recipe = SCHEDULES.get(name)
    if recipe is None:
        raise UserError(f"parallel.schedule is '{name}', expected one of {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}")
    if not recipe.allows(chunks):
        others = [other for other, one in SCHEDULES.items() if one.allows(chunks)]
        raise UserError(
            f"parallel.chunks is {chunks}, but parallel.schedule '{name}' needs {recipe.least_chunks}"
            f"{' or more' if recipe.most_chunks is None else ''}; set parallel.chunks to {recipe.least_chunks}"
            + (f", or parallel.schedule to {' or '.join(others)}" if others else "")
        )
    return recipe


def add_communication(computations: Sequence[Sequence[Action]], placement: Sequence[Sequence[int]]) -> Orders:
    """Add the sends and receives to lists of forwards and backwards.

    A message is sent as soon as it is made and received before it is used; neighbouring stages of one rank need none. Messages
    that came earlier in the same direction are received first, so that both sides of each pair of ranks agree on the order; as they
    were sent before the one that is waited for, this makes nobody wait longer, and no deadlock.
    """
    rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
    arriving: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, actions in enumerate(computations):
        for action in actions:
            for send in _sends(action, rank_of):
                arriving[send.peer, rank].append(_other_side(send, rank))
    return tuple(_with_messages(rank, actions, rank_of, arriving) for rank, actions in enumerate(computations))


def _with_messages(
    rank: int, actions: Sequence[Action], rank_of: dict[int, int], arriving: dict[tuple[int, int], list[Action]]
) -> tuple[Action, ...]:
    queues = {peer: iter(receives) for (receiver, peer), receives in arriving.items() if receiver == rank}
    received: set[Action] = set()
    complete: list[Action] = []
    for action in actions:
        for needed in _receives(action, rank_of):
            while needed not in received and (arrival := next(queues.get(needed.peer, iter(())), None)):
                received.add(arrival)
                complete.append(arrival)
        complete += [action, *_sends(action, rank_of)]
    return tuple(complete)


def _sends(action: Action, rank_of: dict[int, int]) -> list[Action]:
    """What must be sent after an action."""
    sends = []
    for part in action.computations:
        if part.kind is Kind.FORWARD:
            sends.append((Kind.SEND_STATE, part, part.stage + 1))
        elif part.kind in BACKWARDS:
            sends.append((Kind.SEND_GRADIENT, part, part.stage - 1))
    return _between_ranks(sends, rank_of)


def _receives(action: Action, rank_of: dict[int, int]) -> list[Action]:
    """What must be received before an action."""
    receives = []
    for part in action.computations:
        if part.kind is Kind.FORWARD:
            receives.append((Kind.RECEIVE_STATE, part, part.stage - 1))
        elif part.kind in BACKWARDS:
            receives.append((Kind.RECEIVE_GRADIENT, part, part.stage + 1))
    return _between_ranks(receives, rank_of)


def _between_ranks(messages: Sequence[tuple[Kind, Action, int]], rank_of: dict[int, int]) -> list[Action]:
    """As actions, those messages whose other stage exists and lies on another rank."""
    return [
        Action(kind, part.stage, part.micro_batch, rank_of[other])
        for kind, part, other in messages
        if other in rank_of and rank_of[other] != rank_of[part.stage]
    ]


def _other_side(send: Action, rank: int) -> Action:
    """The receive that answers a send of `rank`."""
    if send.kind is Kind.SEND_STATE:
        return Action(Kind.RECEIVE_STATE, send.stage + 1, send.micro_batch, rank)
    return Action(Kind.RECEIVE_GRADIENT, send.stage - 1, send.micro_batch, rank)
