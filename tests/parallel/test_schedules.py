"""Pipeline schedules: complete, free of deadlock and within their memory for any size; faults planted in them are found; splits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.config import UserError
from teratron.parallel.schedule_actions import RECEIVES, SENDS, Action, Kind, Schedule
from teratron.parallel.schedule_check import check
from teratron.parallel.schedule_split import parse_split, split_layers
from teratron.parallel.schedules import SCHEDULES, add_communication, build_schedule, placement
from teratron.parallel.simulate import ScheduleError, peak_activations

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


@st.composite
def schedules(draw: st.DrawFn, ranks: tuple[int, int] = (1, 8)) -> Schedule:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    recipe = SCHEDULES[name]
    chunks = draw(st.integers(recipe.least_chunks, recipe.most_chunks or 4))
    return build_schedule(name, draw(st.integers(*ranks)), draw(st.integers(1, 20)), chunks)


def with_actions(schedule: Schedule, rank: int, actions: Sequence[Action]) -> Schedule:
    return replace(schedule, actions=(*schedule.actions[:rank], tuple(actions), *schedule.actions[rank + 1 :]))


def computed(schedule: Schedule) -> list[list[tuple[Kind, int, int]]]:
    """What each rank computes, in order."""
    return [
        [(part.kind, part.stage, part.micro_batch) for action in actions for part in action.computations] for actions in schedule.actions
    ]


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_every_schedule_is_complete_and_free_of_deadlock(schedule: Schedule) -> None:
    check(schedule)
    done = sorted((stage, micro_batch) for rank in computed(schedule) for kind, stage, micro_batch in rank if kind in (B, W))
    assert done == list(itertools.product(range(schedule.stages), range(schedule.micro_batches)))


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_memory_is_what_the_papers_say(schedule: Schedule) -> None:
    ranks, batches, chunks = schedule.ranks, schedule.micro_batches, schedule.chunks
    peaks = peak_activations(schedule)
    exact = {"gpipe": [batches] * ranks, "1f1b": [min(ranks - rank, batches) for rank in range(ranks)]}
    most = {
        "interleaved": [min(batches, (2 * (ranks - 1 - rank) + (chunks - 1) * ranks + 1) / chunks) for rank in range(ranks)],
        "zb-h1": [min(ranks, batches)] * ranks,
        "zb-h2": [min(2 * ranks - 1, batches)] * ranks,
        "zbv": [min(ranks, batches)] * ranks,
        "dualpipev": [min(ranks + 0.5, batches)] * ranks,
    }
    if schedule.name in exact:
        assert peaks == exact[schedule.name]
    else:
        assert all(peak <= bound for peak, bound in zip(peaks, most[schedule.name], strict=True))
        if batches >= 2 * ranks and batches % ranks == 0:  # and they use what they are allowed
            assert max(peaks) == max(most[schedule.name])


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_one_rank_waits_for_nobody(name: str) -> None:
    schedule = build_schedule(name, 1, 3, SCHEDULES[name].least_chunks)
    check(schedule)
    assert not any(action.peer >= 0 for action in schedule.actions[0])


def test_1f1b_of_two_ranks_in_full() -> None:
    rank_0, rank_1 = build_schedule("1f1b", 2, 2, 1).actions
    send, receive = Kind.SEND_STATE, Kind.RECEIVE_STATE
    back, take = Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT
    assert [(action.kind, action.micro_batch) for action in rank_0] == [
        *[(F, 0), (send, 0), (F, 1), (send, 1)],
        *[(take, 0), (B, 0), (take, 1), (B, 1)],
    ]
    assert [(action.kind, action.micro_batch) for action in rank_1] == [
        *[(receive, 0), (F, 0), (B, 0), (back, 0)],
        *[(receive, 1), (F, 1), (B, 1), (back, 1)],
    ]
    assert {action.peer for action in rank_0 if action.kind in SENDS | RECEIVES} == {1}


def test_dualpipev_overlaps_most_of_a_long_step() -> None:
    schedule = build_schedule("dualpipev", 2, 40, 2)
    assert all(sum(action.kind is Kind.OVERLAP for action in actions) > 70 for actions in schedule.actions)
    pair = next(action for action in schedule.actions[0] if action.parts)
    assert [part.kind for part in pair.parts] == [F, B]
    assert pair.computations == pair.parts
    first = next(action for action in schedule.actions[1] if any(part.kind is B for part in action.computations))
    assert first == Action(B, 2, 0), "the forward before the last rank's first backward would wait for it"


@given(schedules())
@settings(max_examples=50, deadline=None)
def test_neighbouring_stages_of_a_rank_exchange_no_message(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.actions):
        assert all(action.peer != rank for action in actions)
    crossings = sum(one != other for one, other in itertools.pairwise(schedule.rank_of))
    sends = sum(action.kind in SENDS for actions in schedule.actions for action in actions)
    assert sends == 2 * crossings * schedule.micro_batches


def test_placement_goes_round_or_folds() -> None:
    assert placement("interleaved", 2, 3) == ((0, 2, 4), (1, 3, 5))
    assert placement("zbv", 3, 2) == placement("dualpipev", 3, 2) == ((0, 5), (1, 4), (2, 3))
    assert placement("1f1b", 3, 1) == ((0,), (1,), (2,))


@given(schedules(ranks=(1, 4)), st.data())
@settings(max_examples=100, deadline=None)
def test_an_action_left_out_or_done_twice_or_elsewhere_is_found(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    actions = schedule.actions[rank]
    position = data.draw(st.integers(0, len(actions) - 1))
    without, action = [*actions[:position], *actions[position + 1 :]], actions[position]
    with pytest.raises(ScheduleError, match="rank"):
        check(with_actions(schedule, rank, without))
    with pytest.raises(ScheduleError, match="second time"):
        check(with_actions(schedule, rank, [*actions[:position], action, *actions[position:]]))
    if schedule.ranks > 1:
        other = (rank + 1) % schedule.ranks
        moved = with_actions(with_actions(schedule, rank, without), other, [*schedule.actions[other], action])
        with pytest.raises(ScheduleError, match="rank"):
            check(moved)


@given(schedules(ranks=(1, 4)), st.data())
@settings(max_examples=100, deadline=None)
def test_a_backward_before_what_it_needs_is_found(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    actions = list(schedule.actions[rank])
    later = data.draw(st.sampled_from([i for i, one in enumerate(actions) if one.kind in (B, I, W)]))
    moved = actions.pop(later)
    with pytest.raises(ScheduleError, match=re.escape(f"rank {rank}, action 0, {moved}: the ")):
        check(with_actions(schedule, rank, [moved, *actions]))


def test_an_overlap_whose_backward_waits_for_its_forward_is_found() -> None:
    forward, backward = Action(F, 0, 0), Action(B, 0, 0)
    schedule = Schedule("mine", ((0,),), 1, ((Action(Kind.OVERLAP, 0, 0, parts=(forward, backward)),),))
    with pytest.raises(ScheduleError, match="output that it needs is not there"):
        check(schedule)
    check(replace(schedule, actions=((forward, backward),)))


def test_crossed_messages_are_found() -> None:
    schedule = build_schedule("gpipe", 2, 2, 1)
    swapped = list(schedule.actions[0])
    swapped[:4] = [swapped[2], swapped[3], swapped[0], swapped[1]]  # forward and send of micro-batch 1 first
    sentence = (
        "message 0 from rank 0 to rank 1 is sent as the state of micro-batch 1 from stage 0 but received as the state of micro-batch 0"
    )
    with pytest.raises(ScheduleError, match=sentence):
        check(with_actions(schedule, 0, swapped))


def test_a_deadlock_names_what_every_rank_waits_for() -> None:
    """Rank 0 wants a gradient before it goes on, rank 1 wants a second state before its first backward; each list alone is legal."""
    held = placement("1f1b", 3, 1)
    eager = [Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1), Action(B, 0, 1)]
    lazy = [[Action(F, s, 0), Action(F, s, 1), Action(B, s, 0), Action(B, s, 1)] for s in (1, 2)]
    schedule = Schedule("mine", held, 2, add_communication([eager, *lazy], held))
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    assert str(caught.value) == (
        "schedule 'mine' would wait for ever: rank 0 waits at action 2 for the receive of the gradient of micro-batch 0 in stage 0 "
        "from rank 1; rank 1 waits at action 3 for the receive of the state of micro-batch 1 in stage 1 from rank 0; "
        "rank 2 waits at action 2 for the receive of the state of micro-batch 1 in stage 2 from rank 1"
    )


def test_messages_needed_out_of_order_are_received_in_the_order_sent() -> None:
    """Stage 0 sends micro-batches 0, 1; stage 1 takes 1 first: the receive of 0 comes before it all the same."""
    held = placement("1f1b", 2, 1)
    first = [Action(F, 0, 0), Action(F, 0, 1), Action(B, 0, 1), Action(B, 0, 0)]
    second = [Action(F, 1, 1), Action(B, 1, 1), Action(F, 1, 0), Action(B, 1, 0)]
    schedule = Schedule("mine", held, 2, add_communication([first, second], held))
    check(schedule)
    assert [action.micro_batch for action in schedule.actions[1] if action.kind in RECEIVES] == [0, 1]


@pytest.mark.parametrize(
    ("name", "chunks", "sentence"),
    [
        ("zvb", 2, "parallel.schedule is 'zvb', expected one of gpipe, 1f1b, .*did you mean 'zbv'"),
        ("1f1b", 2, "needs 1; set parallel.chunks to 1, or parallel.schedule to interleaved or zbv or dualpipev"),
        ("interleaved", 1, "needs 2 or more; set parallel.chunks to 2, or parallel.schedule to gpipe or 1f1b"),
        (
            "zbv",
            3,
            "is 3, but parallel.schedule 'zbv' needs 2; set parallel.chunks to 2, or parallel.schedule to interleaved$",
        ),
        ("zbv", 0, "set parallel.chunks to 2$"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(name: str, chunks: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_schedule(name, 2, 4, chunks)


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([0, 0.4, 1, 2.5, 6]), st.sampled_from([0, 0.5, 1, 3.2]))
@settings(max_examples=100, deadline=None)
def test_split_makes_the_largest_stage_as_small_as_possible(layers: int, stages: int, embedding: float, head: float) -> None:
    def largest(counts: Sequence[int]) -> float:
        return max(count + embedding * (stage == 0) + head * (stage == stages - 1) for stage, count in enumerate(counts))

    if layers + 2 < stages:
        with pytest.raises(UserError, match=f"model.layers is {layers}, too few for {stages} pipeline stages"):
            split_layers(layers, stages, embedding, head)
        return
    units = split_layers(layers, stages, embedding, head)
    assert [unit for stage in units for unit in stage] == list(range(layers + 2))
    assert all(len(stage) > 0 for stage in units)
    counts = [sum(0 < unit <= layers for unit in stage) for stage in units]
    every = (
        other
        for other in itertools.product(range(layers + 1), repeat=stages)
        if sum(other) == layers and all(count > 0 for count in other[1:-1])
    )
    assert largest(counts) == pytest.approx(min(largest(other) for other in every))


def test_split_gives_the_ends_fewer_layers() -> None:
    assert split_layers(12, 4, 1, 3) == [range(0, 4), range(4, 8), range(8, 12), range(12, 14)]
    assert split_layers(7, 3, 0, 0) == [range(0, 3), range(3, 5), range(5, 9)]


def test_split_by_hand() -> None:
    assert parse_split("3, 4,4,1", 12, 4) == [range(0, 4), range(4, 8), range(8, 12), range(12, 14)]
    assert parse_split("0,2,0", 2, 3) == [range(0, 1), range(1, 3), range(3, 4)]
    assert parse_split("5", 5, 1) == [range(0, 7)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3,4,4", "parallel.split is '3,4,4' for 3 stages, expected 4 .*such as '3,3,3,3'"),
        ("3,4,4,2", "makes 13 layers, but model.layers is 12"),
        ("6,0,3,3", "only the first stage .* may have 0 layers"),
        ("-1,7,3,3", "only the first stage .* may have 0 layers"),
        ("a,b", "expected layers per stage such as '3,3,3,3'"),
        ("", "parallel.split is '', expected layers per stage"),
    ],
)
def test_split_by_hand_is_checked(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_split(text, 12, 4)
