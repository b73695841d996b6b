"""What every optimizer is: state per part on the owned slices of flat buckets, clipping by the global norm (contract C11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor

from teratron.config import OptimConfig
from teratron.models import Part, initial_values
from teratron.optim.clipping import clip_adaptively, clip_values, norm_excess
from teratron.optim.groups import treatment_of
from teratron.optim.matrices import Matrices, square
from teratron.optim.rounding import round_into
from teratron.parallel.boxes import Piece
from teratron.parallel.buckets import Bucket, merged
from teratron.parallel.flat import FlatModel

Values = Callable[[Part, int, tuple[slice, ...]], Tensor]
"""Gives the first values of a region of a part, from it, the seed and the index of the region."""
CACHED = 2**17
"""Elements that stay in a CPU's cache while several operations pass over them."""


@dataclass(frozen=True)
class Update:
    """What is known of an update; the tensors are scalars on the device, which the host never reads."""

    number: int
    """From 1; updates that were skipped do not count."""
    lr: float
    scale: Tensor
    """float64: gradients are to be divided by it; the loss scale and clipping together."""
    skip: Tensor
    """float32: 1 where nothing is to change, as the gradients are not finite; else 0."""

    def clean(self, gradient: Tensor) -> None:
        """Divide a gradient in place; zeros where nothing is to change."""
        gradient.div_(self.scale).masked_fill_(self.skip.bool(), 0.0)

    def gain(self, factor: float, like: Tensor) -> Tensor:
        """A factor as a scalar of another tensor's type, 0 where nothing is to change."""
        return factor * (1 - self.skip).to(like.dtype)


class Optimizer:
    """Updates the masters of a model's buckets. An optimizer has `states`, and `update` or, if a bucket alone does not do, `advance`."""

    states: ClassVar[tuple[str, ...]]
    """Names of the tensors that it keeps for every part."""
    keeps_masters: ClassVar[bool] = False
    """Whether masters are never the very weights with which the model trains."""

    def __init__(self, flat: FlatModel, config: OptimConfig, seed: int = 0) -> None:
        """seed: of what is drawn in updates."""
        self.flat, self.config, self.seed = flat, config, seed
        if config.masters == "bf16":
            for bucket in flat.buckets:
                bucket.master = bucket.shard
        self.state = {name: [self.fresh(bucket, bucket.share) for bucket in flat.trained] for name in self.states}
        self.owned = {bucket: [(at, part.name) for part, _, at in bucket.owned()] for bucket in flat.trained}
        self.adopt(config)

    def adopt(self, config: OptimConfig) -> None:
        """From now on go by a config that differs in weight decay or clipping."""
        self.config = config
        self.treatments = {part.name: treatment_of(part, config, self.flat.stages.config) for part in self.flat.stages.parts()}
        self.alike = {bucket: merged((at, self.treatments[name]) for at, name in owned) for bucket, owned in self.owned.items()}
        """The ranges of each owned slice, relative to it, whose parts are treated alike."""

    @cached_property
    def matrices(self) -> Matrices:
        """What is trained here, matrix by matrix."""
        return Matrices(self.flat)

    def fresh(self, bucket: Bucket, count: int) -> Tensor:
        """A state of so many zeros, in the numbers that `optim.moments` asks for."""
        dtype = torch.bfloat16 if self.config.moments == "bf16" else bucket.exact
        return self.flat.home.zeros(count, dtype)

    def update(self, bucket: Bucket, state: dict[str, Tensor], how: Update) -> None:
        """Change a bucket's master by its gradient, which may be overwritten."""
        raise NotImplementedError

    def advance(self, how: Update) -> None:
        """Change all masters: bucket by bucket, where one needs to know nothing of another."""
        for number, bucket in enumerate(self.flat.trained):
            with self.opened(number, how) as state:
                self.update(bucket, state, how)

    @contextmanager
    def opened(self, number: int, how: Update) -> Iterator[dict[str, Tensor]]:
        """Master and states of the number-th trained bucket in exact numbers; changes to them are kept."""
        bucket, home = self.flat.trained[number], self.flat.home
        home.soon(self.kept(number + 1))
        state = {name: home.bring(flats[number]).to(bucket.exact) for name, flats in self.state.items()}
        with self.widened(bucket, how):
            yield state
        for name, flats in self.state.items():
            if flats[number].dtype == bucket.exact:
                home.keep(flats[number], state[name])
            else:
                kept, changed = (self.state_pieces(name, number, flat) for flat in (flats[number], state[name]))
                self.round(kept, changed, how)
        home.done(self.kept(number))

    def kept(self, number: int) -> list[Tensor]:
        """Master and states of the number-th trained bucket where they lie; nothing behind the last one."""
        return [flats[number] for flats in ([b.master for b in self.flat.trained], *self.state.values()) if number < len(flats)]

    @contextmanager
    def widened(self, bucket: Bucket, how: Update) -> Iterator[None]:
        """The master of a bucket in exact numbers; changes to it are kept."""
        kept, bucket.master = bucket.master, self.flat.home.bring(bucket.master).to(bucket.exact)
        yield
        changed, bucket.master = bucket.master, kept
        if kept.dtype == bucket.exact:
            self.flat.home.keep(kept, changed)
        else:
            self.round(bucket.pieces("weight", kept), bucket.pieces("weight", changed), how)

    def round(self, kept: Iterator[Piece], changed: Iterator[Piece], how: Update) -> None:
        """Put values into bfloat16 of the same pieces, at random up or down."""
        for piece, values in zip(kept, changed, strict=True):
            round_into(piece, values.values, self.seed, how.number)

    def step(self, number: int, lr: float, loss_scale: float = 1.0) -> Tensor:
        """Clip, update, publish, clear the gradients; returns the norm before clipping, a float64 scalar, the same on every rank.

        The gradients are those of loss_scale * loss. With a norm that is not finite nothing changes but the gradients are cleared. The
        device decides that: the host waits for nothing here.
        """
        norm = global_norm(self.flat) / loss_scale
        how = Update(number, lr, loss_scale * self.clip(norm, loss_scale), (~norm.isfinite()).to(torch.float32))
        self.advance(how)
        self.publish(frozen=False)
        self.flat.clear()
        return norm

    def clip(self, norm: Tensor, loss_scale: float) -> Tensor:
        """Clip the gradients as `optim.clip_by` says; returns what all of them are yet to be divided by for that."""
        bound, by = self.config.clip, self.config.clip_by
        if bound and by == "norm":
            return norm_excess(norm, bound)
        if bound and by == "value":
            clip_values(self.flat, bound * loss_scale)
        if bound and by == "adaptive":
            clip_adaptively(self.matrices, bound, loss_scale)
        return torch.ones_like(norm)

    def pieces(self) -> list[Piece]:
        """The training state that this rank owns: `weight/PART` in master precision, and `STATE/PART` for every state.

        They may be written to: nothing is on its way into them any more.
        """
        self.flat.release()
        self.flat.home.settle()
        return list(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        for bucket in self.flat.buckets:
            yield from self._held(bucket.pieces("weight", bucket.master), bucket.master)
        for name, flats in self.state.items():
            for number, flat in enumerate(flats):
                yield from self._held(self.state_pieces(name, number, flat), flat)

    def _held(self, pieces: Iterator[Piece], flat: Tensor) -> Iterator[Piece]:
        """Pieces of a tensor; of one that lies elsewhere they tell its home when they have been read or written to."""
        if not self.flat.home.apart:
            return pieces
        return (replace(piece, done=partial(self.flat.home.done, [flat])) for piece in pieces)

    def state_pieces(self, name: str, number: int, flat: Tensor) -> Iterator[Piece]:
        """What is owned of a state of the number-th trained bucket; flat: the state, or something of its shape."""
        yield from self.flat.trained[number].pieces(name, flat)

    def initialise(self, seed: int, values: Values | None = None) -> None:
        """First values of all weights, each rank its own slices (contract C8), and fresh states. values: None = random ones."""
        values = values or initial_values
        for bucket in self.flat.buckets:
            for part, boxes, place in bucket.owned():
                target = bucket.master[place]
                for box in boxes:
                    target[: box.count] = values(part, seed, box.slices()).flatten()
                    target = target[box.count :]
            self.flat.home.done([bucket.master])
        for flat in (flat for flats in self.state.values() for flat in flats):
            self.flat.home.clear(flat)
        self.publish()

    def publish(self, frozen: bool = True) -> None:
        """After masters or states have changed: give the model the weights with which it trains.

        frozen: whether weights that do not learn have changed too.
        """
        self.flat.publish(frozen=frozen)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The model has the weights by which it is judged."""
        yield


def global_norm(flat: FlatModel) -> Tensor:
    """The 2-norm of all gradients together, each element counted once over all ranks; a float64 scalar, the same on every rank."""
    ranges = [(b, place, held * b.sharding.copies.size) for b in flat.trained for place, held in b.norm_ranges()]
    squares = [square(bucket.gradient[place]) / copies for bucket, place, copies in ranges]
    device = flat.home.device
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    flat.mesh.all.sum(total).wait()
    return total.sqrt()


def cached(place: slice, device: torch.device) -> Iterator[slice]:
    """A range as pieces over which several operations pass while they stay in the cache; whole on devices other than a CPU."""
    size = CACHED if device.type == "cpu" else max(1, place.stop - place.start)
    for start in range(place.start, place.stop, size):
        yield slice(start, min(start + size, place.stop))
