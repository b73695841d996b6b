"""A model on flat buckets: when weights are gathered, when gradients are reduced, when memory is given back.

Reductions begin as soon as the last gradient of a bucket is there, while backward goes on; weights are gathered one unit ahead of
their use. The order is the same on every rank, since every rank runs the same units.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teratron.config import ParallelConfig
from teratron.models.blocks import Head
from teratron.models.leaves import accurate
from teratron.models.moe import Experts
from teratron.models.units import LOAD, TERM
from teratron.parallel.apply import replace_parameters
from teratron.parallel.buckets import Bucket, Sharding, is_released, release, restore
from teratron.parallel.mesh import DATA, Group, Mesh, Pending
from teratron.parallel.offload import Home
from teratron.parallel.stages import Stages


class FlatModel:
    """Takes over the parameters of a rank's stages (on the meta device or filled): they become views of buckets, one a unit and type.

    `gather` runs by itself ahead of every unit's forward and backward pass. Backward passes go through `backward`, which after the
    last of a stage begins its reductions; `finish` ends them, and after the optimizer has changed the masters `publish` tells all.
    """

    def __init__(self, stages: Stages, mesh: Mesh, parallel: ParallelConfig, home: Home | None = None) -> None:
        """home: where masters and an optimizer's state lie; None = in memory, with the weights."""
        self.stages, self.mesh, self.home = stages, mesh, home or Home()
        same = mesh.group(*DATA, "context")  # context ranks hold the same weights and share what is sharded
        self.sharding = Sharding.of(parallel, mesh.group("shard", "context"), mesh.group("replicate"), same)
        self.whole = Sharding(mesh.group(), same)
        copies = mesh.expert_copies(parallel.expert, parallel.sequence)
        self.expert_sharding = Sharding.of(parallel, copies, mesh.group(), copies)
        self.tied = mesh.among("pipeline", stages.table_ranks)
        self.buckets: list[Bucket] = []
        self._late: list[Bucket] = []
        """Buckets to whose gradients several stages add, here or elsewhere: they are reduced when all have done so."""
        self._tied: list[Bucket] = []
        """Those of them that other pipeline ranks hold too."""
        self._uses: dict[nn.Module, list[Bucket]] = {}
        self._units = {stage: model.units() for stage, model in stages.stages().items()}
        self._make_buckets()
        self._gathers: dict[Bucket, Pending] = {}
        self._reductions: deque[tuple[Bucket, Tensor, Tensor, Pending, bool]] = deque()
        self._copies: list[tuple[Bucket, Tensor, Pending]] = []
        """Sums over the copies of owned slices, which follow the last reduction of a bucket."""
        self._missing: dict[Bucket, int] = {}
        self._last, self._split = True, False
        self.watch: Callable[[Bucket, Tensor], None] | None = None
        """Is told of each whole gradient of this rank alone, before it is reduced."""
        # Made by all ranks together, here: a stage may hold no attention whose key/value heads are shared.
        mesh.neighbours("tensor", max(1, mesh.tensor.size // stages.config.key_value_heads))
        self._watch()

    @property
    def trained(self) -> list[Bucket]:
        return [bucket for bucket in self.buckets if bucket.trained]

    def _make_buckets(self) -> None:
        """One bucket for each unit, type, and whether it is trained; a shared parameter lies with its first unit.

        A table that several stages hold has a bucket of its own, so that all of them cut it into the same slices.
        """
        owner: dict[int, Bucket] = {}
        names = {id(parameter): name for name, parameter in self.stages.named_parameters()}
        parts, values = self.stages.parts(), dict[str, Tensor]()
        users = Counter(id(parameter) for units in self._units.values() for parameter in {p for unit in units for p in unit.parameters()})
        tied = {part.parameter for part in parts if part.holders > 1}
        experts = {id(p) for module in self.stages.modules() if isinstance(module, Experts) for p in module.parameters()}
        for unit in (unit for units in self._units.values() for unit in units):
            kinds: dict[Any, dict[str, nn.Parameter]] = {}
            for parameter in unit.parameters():
                if id(parameter) not in owner:
                    name = names[id(parameter)]
                    # Frozen vectors, such as routers' biases, are small and written to from outside: they stay whole.
                    whole = not parameter.requires_grad and parameter.dim() == 1
                    kind = parameter.dtype, parameter.requires_grad, id(parameter) in experts, name in tied, whole
                    kinds.setdefault(kind, {})[name] = parameter
            for (_, trained, expert, of_several, whole), parameters in kinds.items():
                late = of_several or any(users[id(parameter)] > 1 for parameter in parameters.values())
                sharding = self.whole if whole else self.expert_sharding if expert else self.sharding
                bucket = Bucket(parameters, parts, replace(sharding, keep_gradients=sharding.keep_gradients or late), self.home)
                bucket.lasting = not trained and not whole
                self.buckets.append(bucket)
                if late:
                    self._late.append(bucket)
                if of_several:
                    self._tied.append(bucket)
                owner |= {id(parameter): bucket for parameter in parameters.values()}
                values |= bucket.views
            self._uses[unit] = list(dict.fromkeys(owner[id(parameter)] for parameter in unit.parameters()))
        replace_parameters(self.stages, values)

    def _watch(self) -> None:
        """Hooks: gradients that arrive, units that begin and end."""
        parameters = dict(self.stages.named_parameters())
        for bucket in self.trained:
            for name, slope in bucket.slopes.items():
                parameters[name].grad = slope
                parameters[name].register_post_accumulate_grad_hook(self._arrival(bucket))
        if all(bucket.owners.size == 1 for bucket in self.buckets):
            return
        for unit in self._uses:
            unit.register_forward_pre_hook(self._before_forward)
            unit.register_forward_hook(self._after_forward)

    # Weights

    def _need(self, unit: nn.Module) -> None:
        """Begin to gather a unit's weights, unless they are there."""
        for bucket in self._uses[unit]:
            if is_released(bucket.weights):
                restore(bucket.weights)
                # `.data`: autograd need not know, as what it saved comes back as it was.
                self._gathers[bucket] = bucket.owners.gather(bucket.weights.data, bucket.shard)

    def _await(self, unit: nn.Module) -> None:
        self._need(unit)
        for bucket in self._uses[unit]:
            if bucket in self._gathers:
                self._gathers.pop(bucket).wait()

    def _neighbour(self, unit: nn.Module, step: int) -> nn.Module | None:
        """The unit before or behind in the same stage."""
        units = next(units for units in self._units.values() if unit in units)
        place = units.index(unit) + step
        return units[place] if 0 <= place < len(units) else None

    def _before_forward(self, unit: nn.Module, inputs: Any) -> None:
        self._await(unit)
        following = self._neighbour(unit, 1)
        if following is not None:
            self._need(following)

    def _after_forward(self, unit: nn.Module, inputs: Any, outputs: dict[str, Tensor]) -> None:
        following = self._neighbour(unit, 1)
        if isinstance(unit, Head):
            return  # it goes on to the loss
        for bucket in self._uses[unit]:
            if not bucket.sharding.keep_weights and (following is None or bucket not in self._uses[following]):
                release(bucket.weights)
        passed_on = {id(tensor) for tensor in inputs[0].values()}
        made = {name: tensor for name, tensor in outputs.items() if tensor.requires_grad and id(tensor) not in passed_on}
        awaited = {name for name in made if not name.startswith((TERM, LOAD))}
        for name, tensor in made.items():
            tensor.register_hook(partial(self._arrived_between, unit, following, awaited, name))

    def _arrived_between(self, unit: nn.Module, following: nn.Module | None, awaited: set[str], name: str, gradient: Tensor) -> None:
        """A gradient of a unit's outputs is there; with all that are awaited the following unit needs its weights no more.

        Those that are trained go when their own gradients are there; the frozen ones have none.
        """
        self._before_backward(unit)
        awaited.discard(name)
        if following is not None and not awaited:
            for bucket in self._uses[following]:
                if not bucket.trained and not bucket.sharding.keep_weights and bucket not in self._uses[unit]:
                    release(bucket.weights)

    def _before_backward(self, unit: nn.Module) -> None:
        """The first gradient of a unit's outputs is there."""
        self._await(unit)
        for bucket in self._uses[unit]:
            if bucket.trained and is_released(bucket.backward) and self._missing.get(bucket):
                restore(bucket.backward)
                bucket.backward.zero_()
        before = self._neighbour(unit, -1)
        if before is not None:
            self._need(before)

    def publish(self, values: Callable[[Bucket], Tensor] | None = None, frozen: bool = True) -> None:
        """After the masters have changed: round them into the weights, and let the other ranks have theirs ahead of the next use.

        values: what becomes the weights that a bucket owns; None = its master. frozen: whether those that do not learn have changed too.
        """
        self.release()  # what is still on its way would come down on what is written now
        buckets = self.buckets if frozen else self.trained
        for bucket in buckets:
            owned = self.home.bring(bucket.master) if values is None else values(bucket)
            if owned is not bucket.shard:
                bucket.shard.copy_(owned)
                self.home.done([bucket.master])
        for bucket in buckets:
            if bucket.sharding.keep_weights:
                self._gathers[bucket] = bucket.owners.gather(bucket.weights, bucket.shard)

    def release(self) -> None:
        """Give back the whole weights that `parallel.shard = parameters` does not keep; needed after an evaluation."""
        for pending in self._gathers.values():
            pending.wait()
        self._gathers.clear()
        for bucket in self.buckets:
            if not bucket.sharding.keep_weights:
                release(bucket.weights)

    # Gradients

    def backward(self, stage: int, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], last: bool, split: bool = False) -> None:
        """Backward pass of one micro-batch through a stage; last: of this step. split: weight gradients are still to come."""
        units = self._units[stage]
        buckets = dict.fromkeys(bucket for unit in units for bucket in self._uses[unit] if bucket.trained)
        self._missing = {bucket: len(bucket.places) for bucket in buckets}
        self._last, self._split = last, split
        if isinstance(units[-1], Head):
            self._before_backward(units[-1])
        torch.autograd.backward(tensors, gradients)
        if split:
            return
        for bucket, missing in self._missing.items():
            if missing:  # parameters that this micro-batch did not use
                self._reduce(bucket)
        if any(not bucket.sharding.keep_gradients for bucket in buckets):
            self._drain()
        self.release()

    def weights_made(self, stage: int, last: bool) -> None:
        """What a split backward pass had left is there."""
        self._last = last
        for bucket in dict.fromkeys(bucket for unit in self._units[stage] for bucket in self._uses[unit] if bucket.trained):
            self._reduce(bucket)

    def finish(self) -> None:
        """After all backward passes of a step: every `gradient` is whole and reduced."""
        self._drain()
        for bucket in self._late:
            if bucket.trained:
                self._send(bucket, bucket.total)
        self._drain()
        for bucket, summed, pending in self._copies:
            pending.wait()
            bucket.gradient.copy_(summed)
        self._copies.clear()
        # Last, so that the table stays the same bit for bit in all stages: sums over data ranks may round differently in each.
        for pending in [self.tied.sum(bucket.gradient) for bucket in self._tied if bucket.trained]:
            pending.wait()

    def _drain(self) -> None:
        while self._reductions:
            self._collect()

    def _arrival(self, bucket: Bucket) -> Callable[[Tensor], None]:
        flat = weakref.ref(self)  # a tensor's hooks are out of the garbage collector's sight: they must not keep the model alive

        def arrived(parameter: Tensor) -> None:
            model = flat()
            if model is not None:
                model._missing[bucket] -= 1
                if not model._missing[bucket] and not model._split:
                    model._reduce(bucket)

        return arrived

    def _reduce(self, bucket: Bucket) -> None:
        """All gradients of a bucket of this micro-batch are there."""
        self._missing[bucket] = 0
        if bucket.sharding.keep_gradients:
            bucket.collect()
            if self._last and bucket not in self._late:
                self._send(bucket, bucket.total)
        else:
            if is_released(bucket.backward):  # not one of its parameters was used
                restore(bucket.backward)
                bucket.backward.zero_()
            self._send(bucket, bucket.backward)
        if not bucket.sharding.keep_weights:
            release(bucket.weights)

    def _send(self, bucket: Bucket, gradient: Tensor) -> None:
        """Start the sum over the data ranks, after that over tensor ranks which have a share of a gradient each.

        The reduction before is finished first where that frees its whole gradient, or lets the sum over its copies begin; others where
        nobody need be waited for, so that what ranks hand each other does not pile up.
        """
        if self._reductions and (bucket.hybrid or not bucket.sharding.keep_gradients):
            self._collect()
        while self._reductions and not self._reductions[0][0].hybrid and self._reductions[0][3].ready:
            self._collect()
        if self.watch is not None:
            self.watch(bucket, gradient)
        sent = gradient.to(accurate(gradient.dtype))
        for copies, ranges in bucket.partial_ranges().items():
            self._sum_shares(sent, self.mesh.neighbours("tensor", copies), ranges)
        sent = bucket.wired(sent)
        if bucket.owners.size > 1:
            summed = sent.new_empty(bucket.share)
            pending = bucket.owners.scatter_sum(summed, sent)
        else:
            summed = sent
            pending = bucket.sharding.copies.sum(sent)
        last = self._last or bucket.sharding.keep_gradients
        self._reductions.append((bucket, sent, summed, pending, last))  # what is sent stays alive until it has arrived

    def _sum_shares(self, gradient: Tensor, group: Group, ranges: list[slice]) -> None:
        if group.size == 1 or not ranges:
            return
        together = torch.cat([gradient[place] for place in ranges])
        group.sum(together).wait()
        for place, summed in zip(ranges, together.split([r.stop - r.start for r in ranges]), strict=True):
            gradient[place] = summed

    def _collect(self) -> None:
        """Finish the oldest reduction."""
        bucket, _, summed, pending, last = self._reductions.popleft()
        pending.wait()
        if bucket.sharding.keep_gradients:
            if summed is not bucket.total:  # of which the gradient is a view
                bucket.gradient.copy_(summed)
        else:
            bucket.gradient += summed
            release(bucket.backward)
        if bucket.hybrid and last:
            summed = bucket.wired(bucket.gradient)
            self._copies.append((bucket, summed, bucket.sharding.copies.sum(summed)))

    def clear(self) -> None:
        """Zero gradients for the next step."""
        for bucket in self.trained:
            bucket.gradient.zero_()
            if bucket.sharding.keep_gradients:
                bucket.total.zero_()
