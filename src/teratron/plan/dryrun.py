"""The dry run: one rank's step with the real engine, on fake tensors and imagined groups, for a cluster of any size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from teratron.config import Config, UserError
from teratron.data.special import SpecialTokens
from teratron.models.moe import Experts
from teratron.objectives import Batch, Objective
from teratron.optim import learning_rate
from teratron.parallel.experts import ExpertDispatch
from teratron.parallel.mesh import check_layout, mesh_sizes
from teratron.parallel.pipeline import Runtime
from teratron.parallel.schedule_actions import Action, Kind
from teratron.plan.imagined import ImaginedMesh
from teratron.plan.layout import assumed_vocabulary
from teratron.plan.meter import OPTIMIZER, Deed, Message, Meter

OFFLOADED = "offloaded"
"""Memory that is not the device's (`parallel.offload`)."""
STATE = ("weights", "gradients", "optimizer", OFFLOADED)
"""Kinds of memory that stay between steps."""


class Work(NamedTuple):
    """What operations do, each by itself."""

    flops: int
    moved: int
    """Bytes that they read and write."""


@dataclass(frozen=True)
class DryRun:
    """What a step takes on one rank."""

    config: Config
    sizes: dict[str, int]
    """The degree of every axis."""
    rank: int
    micro_batches: int
    state: dict[str, int]
    """Bytes between steps, by kind."""
    peak: dict[str, int]
    """Bytes by kind at the moment of a step when there are the most."""
    work: dict[str, Work]
    """By kind of work."""
    messages: dict[Message, tuple[int, int, int]]
    """Of collectives that are alike: calls, bytes of the whole tensors, bytes that leave this rank."""

    @property
    def world(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of a step."""
        return sum(work.flops for work in self.work.values())

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return on_device(self.peak)


def dry_run(
    config: Config, world: int, rank: int, build: Callable[[Config, ImaginedMesh], Any], load: float = 1.0, whole: bool = False
) -> DryRun:
    """Measure one step of one rank of `world`.

    build: the engine of a rank. load: the rows of this rank's experts over the mean of all. whole: execute every micro-batch, instead of
    three of each stage and the rest on paper. Raises `UserError` for what a run would refuse.
    """
    config = config.override({"model.vocab_size": config.model.vocab_size or assumed_vocabulary(config)})
    if world < 1:
        raise UserError(f"--world {world}: expected at least 1 process")
    if not 0 <= rank < world:
        raise UserError(f"--rank {rank}: expected a rank from 0 to {world - 1}, as --world is {world}")
    sizes = mesh_sizes(config.parallel, world, config.model)
    check_layout(config.model, config.parallel, world)
    with FakeTensorMode(), Meter() as meter:
        mesh = ImaginedMesh(sizes, rank, meter=meter)
        with PlainMeta():
            engine = build(config, mesh)
        engine.runtime = partial(SteadyRuntime, meter, whole)
        _assume_load(engine, load)
        label_state(meter, engine)
        engine.flat.publish(frozen=False)  # as the step before has left it
        state = {kind: meter.now.memory[kind] for kind in STATE if meter.now.memory[kind] or kind != OFFLOADED}
        rows = config.largest_batch // mesh.data.size
        batch = fake_batch(engine.objective, config, rows)
        meter.label("batch", batch.values())
        meter.restart()
        engine.step(batch, step=1, number=1, lr=learning_rate(config, 1), around=meter.working(OPTIMIZER))
    now = meter.now
    messages = {message: (calls, now.volume[message], now.sent[message]) for message, calls in now.calls.items()}
    work = {kind: Work(now.flops[kind], now.moved[kind]) for kind in now.moved}
    return DryRun(config, mesh.sizes, rank, rows // (config.train.micro_batch or rows), state, _present(meter.peak), work, messages)


def on_device(memory: Mapping[str, int]) -> int:
    """Bytes of all kinds of memory that the device has."""
    return sum(memory.values()) - memory.get(OFFLOADED, 0)


def _present(memory: Counter[str]) -> dict[str, int]:
    return {kind: size for kind, size in memory.items() if size}


def label_state(meter: Meter, engine: Any) -> None:
    """Tell a meter what the buffers of an engine are for."""
    kept = "optimizer" if engine.config.parallel.offload == "none" else OFFLOADED
    for bucket in engine.flat.buckets:
        meter.label("weights", [bucket.weights, bucket.shard])
        meter.label(kept, [bucket.master])
        others = [value for value in vars(bucket).values() if isinstance(value, Tensor)]
        meter.label("gradients", others)
    meter.label(kept, [moment for moments in engine.optimizer.state.values() for moment in moments])


def fake_batch(objective: Objective, config: Config, rows: int) -> Batch:
    """A batch as the objective makes it, without content."""
    samples = EmptySamples(objective.needs.length or config.model.seq_length)
    special = SpecialTokens(config.model.vocab_size, 0, dict.fromkeys(objective.needs.roles, 0))
    with unset_fake_temporarily():
        batch = objective.prepare(samples, np.zeros(1, np.int64), special)
    return {name: torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype) for name, tensor in batch.items()}


@dataclass(frozen=True)
class EmptySamples:
    """Rows of token 0."""

    seq_length: int
    count: int | None = None

    def rows(self, index: np.ndarray) -> np.ndarray:
        return np.zeros((len(index), self.seq_length + 1), np.int64)


def _assume_load(engine: Any, load: float) -> None:
    """What the host would read of routers' choices: even shares, `load` times as many rows for this rank's experts."""

    def read_shares(sent: Tensor, came: Tensor, rows: int) -> tuple[list[int], list[int]]:
        return even(rows, len(sent)), even(round(rows * load), len(came))

    def read_ends(ends: Tensor, rows: int) -> list[int]:
        return [rows * (number + 1) // len(ends) for number in range(len(ends))]

    for module in engine.stages.modules():
        if isinstance(module, Experts):
            module.read_ends = read_ends  # type: ignore[method-assign,assignment]
        if isinstance(module, ExpertDispatch):
            module.read_shares = read_shares  # type: ignore[method-assign]


def even(total: int, parts: int) -> list[int]:
    """`total` as a sum of numbers at most one apart."""
    return [end - start for start, end in pairwise(total * place // parts for place in range(parts + 1))]


class SteadyRuntime(Runtime):
    """Executes a few micro-batches of a step; those between do to the meter what the second one did.

    An action of a schedule does the same for each of them, whatever else is under way: so every list of actions may be played like this.
    """

    def __init__(self, meter: Meter, whole: bool, *args: Any) -> None:
        super().__init__(*args)
        self.meter = meter
        self.executed = set(range(self.schedule.micro_batches)) if whole else leading(self.actions)
        self.known: dict[tuple[Kind, int], Deed] = {}

    def _perform(self, action: Action) -> None:
        kind = action.kind, action.stage
        if action.micro_batch in self.executed:
            self.known[kind] = self.meter.watch(partial(super()._perform, action))
            return
        self.meter.repeat(self.known[kind])
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
            self.work.left[action.stage] -= 1  # type: ignore[attr-defined]  # the last one begins the reductions


def leading(actions: Iterable[Action]) -> set[int]:
    """The micro-batches that are the first, the second or the last one of any kind of action."""
    order: dict[tuple[Kind, int], list[int]] = {}
    for part in (part for action in actions for part in action.parts or (action,)):
        order.setdefault((part.kind, part.stage), []).append(part.micro_batch)
    return {number for numbers in order.values() for number in (*numbers[:2], numbers[-1])}


class PlainMeta(TorchDispatchMode):
    """Leaves tensors on the meta device as they are: they have no memory, and modules of fake ones cannot be cast."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        plain = kwargs.get("device") == torch.device("meta") or any(type(arg) is not FakeTensor and _on_meta(arg) for arg in args)
        with unset_fake_temporarily() if plain else nullcontext():
            return func(*args, **kwargs)


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"
