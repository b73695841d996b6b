"""Which rank holds what: a config laid out on so many ranks, without processes, weights or data. Raises what the run would refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from teratron.config import Config, ParallelConfig, UserError
from teratron.optim import build_optimizer
from teratron.parallel.device import DTYPES
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Group, Mesh, check_layout, mesh_sizes
from teratron.parallel.offload import Home
from teratron.parallel.schedules import build_schedule
from teratron.parallel.simulate import Timeline, peak_activations, simulate
from teratron.parallel.stages import Stages, chunk_count, cut_stages

BACKWARD = {"none": 1.0, "selective": 1.0, "full": 2.0}
"""Time of a backward pass for inputs in forward passes, what is made again included; that for weights takes one."""

STEADY = 48
"""Micro-batches after which a pipeline of few ranks is full; more ranks take two rounds."""


class PaperMesh(Mesh):
    """A mesh whose groups have places but no communicators: any number of ranks, in one process."""

    def _meet(self) -> None:
        """There is nobody."""

    def _lines(self, axes: tuple[str, ...]) -> Iterable[list[int]]:  # type: ignore[override]
        """Of all groups along some axes this rank's own, without counting out thousands of ranks."""
        strides, line = self._strides(), [self.rank]
        for axis in axes:
            place = self.rank // strides[axis] % self.sizes[axis]
            line = [rank + (other - place) * strides[axis] for rank in line for other in range(self.sizes[axis])]
        yield line

    def _strides(self) -> dict[str, int]:
        axes = list(self.sizes)
        return {axis: math.prod(self.sizes[inner] for inner in axes[place + 1 :]) for place, axis in enumerate(axes)}

    def _group(self, key: tuple[Any, ...], lines: Iterable[list[int]], own: bool = False) -> Group:
        if key not in self._groups:
            mine = next((ranks for ranks in lines if self.rank in ranks), [self.rank])
            self._groups[key] = Group(tuple(mine), mine.index(self.rank))
        return self._groups[key]


@dataclass(frozen=True)
class Share:
    """What one rank holds."""

    parts: dict[str, tuple[int, ...]]
    """Shapes of the pieces of parts by name."""
    state: int
    """Bytes of weights, gradients and optimizer state that stay between steps."""

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.parts.values()))


@dataclass(frozen=True)
class Layout:
    """A config on a number of ranks; see `lay_out`."""

    config: Config
    sizes: dict[str, int]
    """The degree of every axis, outermost first."""
    held: tuple[tuple[int, ...], ...]
    """The stages of every pipeline rank."""
    units: list[range]
    """The units of every stage."""
    shares: list[Share]
    """Of every pipeline rank; where shares of tensor ranks differ, the largest."""

    @property
    def world(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def places(self) -> list[dict[str, int]]:
        """Everything beside a tensor group, in rank order: its place on the axes between pipeline and tensor."""
        inner = [axis for axis in self.sizes if axis not in ("pipeline", "tensor")]
        counts = [self.sizes[axis] for axis in inner]
        return [
            {axis: number // math.prod(counts[place + 1 :]) % counts[place] for place, axis in enumerate(inner)}
            for number in range(math.prod(counts))
        ]

    def ranks(self, pipeline: int, place: int) -> range:
        """The global ranks of a tensor group: neighbours, as tensor is the innermost axis."""
        tensor = self.sizes["tensor"]
        start = (pipeline * len(self.places) + place) * tensor
        return range(start, start + tensor)

    def experts(self, place: int) -> list[range]:
        """The experts of each layer that the ranks of a tensor group hold: one range for all of them, or with sequence one each."""
        degree, tensor = self.config.parallel.expert, self.sizes["tensor"] if self.config.parallel.sequence else 1
        share = self.config.model.experts // degree
        numbers = [(place * tensor + rank) % degree for rank in range(tensor)]
        return [range(number * share, (number + 1) * share) for number in numbers]

    @property
    def data_ranks(self) -> int:
        return self.sizes["replicate"] * self.sizes["shard"]

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass."""
        return self.config.train.micro_batch or self.config.largest_batch // self.data_ranks

    @property
    def micro_batches(self) -> int:
        """Of each data rank in the largest step."""
        return self.config.largest_batch // self.data_ranks // self.micro_batch

    @property
    def stage_costs(self) -> list[float]:
        """Time of each stage's forward pass in layers: matrix products alone, the output projection among them."""
        last = max(units.stop for units in self.units) - 1
        return [len([n for n in units if 0 < n < last]) + (self.head_cost if last in units else 0.0) for units in self.units]

    @property
    def head_cost(self) -> float:
        """Time of the output projection in layers."""
        model = self.config.model
        heads = 2 * model.hidden * model.head_features * (model.heads + model.key_value_heads)
        return model.vocab_size * model.hidden / (heads + (3 if model.gated else 2) * model.hidden * model.ffn_width)

    @cached_property
    def pipeline(self) -> Pipeline | None:
        """How the schedule goes; None without a pipeline."""
        return play(self) if len(self.held) > 1 else None


@dataclass(frozen=True)
class Pipeline:
    """A schedule played with the costs of a model's stages."""

    drawn: Timeline
    """With at most as many micro-batches as a picture can show."""
    bubble: float
    """Idle share of the ranks' time, with all micro-batches of a step."""
    peak: float
    """The most micro-batches of its share whose activations a rank holds at once."""


def lay_out(config: Config, world: int, check: Callable[[Config, int], None] | None = None) -> Layout:
    """Lay a config out on `world` ranks. check: what else a run would refuse of a number of data ranks.

    A model whose vocabulary only the data knows is drawn with that of `assumed_vocabulary`. Raises `UserError`.
    """
    config = config.override({"model.vocab_size": config.model.vocab_size or assumed_vocabulary(config)})
    if world < 1:
        raise UserError(f"--world {world}: expected at least 1 process")
    sizes = mesh_sizes(config.parallel, world)
    mesh = PaperMesh(sizes)
    if check is not None:
        check(config, mesh.data.size)
    check_layout(config.model, config.parallel)
    tensor = mesh.sizes["tensor"]  # rounding favours the last of its ranks
    corners = [PaperMesh(sizes, rank * (world // sizes["pipeline"]) + tensor - 1) for rank in range(sizes["pipeline"])]
    cut = [cut_stages(config.model, corner, config.parallel, DTYPES[config.train.precision]) for corner in corners]
    shares = [_share(config, stages, corner) for stages, corner in zip(cut, corners, strict=True)]
    return Layout(config, mesh.sizes, tuple(tuple(stages.stages()) for stages in cut), cut[0].units, shares)


def least_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that the degrees ask for."""
    return parallel.pipeline * parallel.context * parallel.tensor * (parallel.replicate or 1)


def assumed_vocabulary(config: Config) -> int:
    """A vocabulary in place of the data's: as large as `data.tokenizer` asks for, else no more than the padding's multiple."""
    size = config.data.tokenizer.removeprefix("bpe:")
    return int(size) if size.isdecimal() and int(size) else config.model.vocab_multiple if size else 8192


def _share(config: Config, stages: Stages, mesh: Mesh) -> Share:
    """Counted on the buffers that a run would make, on the meta device."""
    shapes = {part.name: part.size for part in stages.parts()}
    flat = FlatModel(stages, mesh, config.parallel, Home("meta"))
    optimizer = build_optimizer(flat, config.optim)
    found = [value for bucket in flat.buckets for value in vars(bucket).values() if isinstance(value, torch.Tensor)]
    found += [value for values in optimizer.state.values() for value in values]
    storages = {storage._cdata: storage.nbytes() for storage in (value.untyped_storage() for value in found)}
    return Share(shapes, sum(storages.values()))


def play(layout: Layout) -> Pipeline:
    """Play a layout's schedule.

    Once a pipeline is full its time and its peak grow evenly with every round of micro-batches, one for each pipeline rank: the
    thousands follow from two rounds.
    """
    parallel, ranks, count = layout.config.parallel, len(layout.held), layout.micro_batches
    costs = layout.stage_costs
    inputs = 1 + (BACKWARD[layout.config.train.recompute] - 1) / layout.config.train.recompute_every

    @cache
    def played(batches: int) -> Timeline:
        schedule = build_schedule(parallel.schedule, ranks, batches, chunk_count(parallel))
        return simulate(schedule, costs, [cost * inputs for cost in costs], costs)

    work = (2 + inputs) * sum(costs) / ranks
    drawn = played(min(count, max(8, 2 * ranks)))
    full = max(2, -(-STEADY // ranks))
    rounds = [ranks * (full + more) + count % ranks for more in (0, 1)] if count > (full + 2) * ranks else [count]
    time, peak = (_further([measure(played(batches)) for batches in rounds], rounds, count) for measure in (lambda t: t.cost, _peak))
    return Pipeline(drawn, max(0.0, 1 - count * work / time), peak)


def _peak(timeline: Timeline) -> float:
    return max(peak_activations(timeline.schedule))


def _further(values: Sequence[float], places: Sequence[int], place: int) -> float:
    """The value at a place on the line through the last two."""
    if len(values) == 1:
        return values[0]
    return values[1] + (values[1] - values[0]) * (place - places[1]) / (places[1] - places[0])
