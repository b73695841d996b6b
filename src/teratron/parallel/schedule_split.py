"""Which units of a model go to which pipeline stage: unit 0 is the embedding, 1 to `layers` the layers, `layers + 1` the head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from teratron.config import UserError


def split_layers(layers: int, stages: int, embedding_cost: float, head_cost: float) -> list[range]:
    """The split whose most expensive stage is as cheap as possible, each stage's units in order.

    Costs are in layers: 1.5 means as much as one layer and a half. Of equal stages the later ones take the extra layers, as they
    hold the fewest activations in 1F1B. Raises UserError where there are not enough layers for every stage to hold a unit.
    """
    if layers + 2 < stages:
        raise UserError(_too_many_stages(layers, stages))
    costs, counts = [0.0] * stages, [0] * stages
    costs[0] += embedding_cost
    costs[-1] += head_cost
    empty = {stage: 0 < stage < stages - 1 for stage in range(stages)}
    for _ in range(layers):  # the cheapest so far takes the next: no other choice could end with a lower maximum
        stage = min(range(stages), key=lambda stage: (not empty[stage], costs[stage], -stage))
        counts[stage] += 1
        costs[stage] += 1
        empty[stage] = False
    return _units(counts)


def parse_split(text: str, layers: int, stages: int) -> list[range]:
    """The split that a user wrote as layers per stage, such as `3,4,4,1`; each stage's units in order.

    The first stage has the embedding as well and the last the head, so these may have 0 layers. Raises UserError.
    """
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"parallel.split is '{text}', expected layers per stage such as {_example(layers, stages)}") from None
    if len(counts) != stages:
        raise UserError(
            f"parallel.split is '{text}' for {len(counts)} stages, expected {stages} (parallel.pipeline x parallel.chunks), "
            f"such as {_example(layers, stages)}"
        )
    if sum(counts) != layers:
        raise UserError(
            f"parallel.split is '{text}', which makes {sum(counts)} layers, but model.layers is {layers}; "
            f"write such as {_example(layers, stages)}"
        )
    if min(counts) < 0 or 0 in counts[1:-1]:
        raise UserError(
            f"parallel.split is '{text}', but only the first stage (embedding) and the last (head) may have 0 layers; "
            f"write such as {_example(layers, stages)}"
        )
    return _units(counts)


def _units(counts: Sequence[int]) -> list[range]:
    """From layers per stage to units per stage."""
    ends = [0, *accumulate(counts)]
    bounds = [0, *(end + 1 for end in ends[1:-1]), ends[-1] + 2]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _example(layers: int, stages: int) -> str:
    even = split_layers(layers, stages, 0, 0)
    counts = [len(units) - (index == 0) - (index == stages - 1) for index, units in enumerate(even)]
    return f"'{','.join(map(str, counts))}'"


def _too_many_stages(layers: int, stages: int) -> str:
    return (
        f"model.layers is {layers}, too few for {stages} pipeline stages (parallel.pipeline x parallel.chunks), each of which needs a "
        f"layer, the embedding or the head; use at most {layers + 2} stages or at least {stages - 2} layers"
    )
