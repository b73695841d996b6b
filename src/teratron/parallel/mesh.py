"""The mesh: all ranks on named axes, and the groups of ranks along them. The only place that calls torch.distributed's collectives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teratron.config import ModelConfig, ParallelConfig, UserError
from teratron.parallel.doing import TIMEOUT, Doing
from teratron.parallel.host import Host, Line, Shared
from teratron.parallel.meet import meet
from teratron.parallel.spans import STARVED, WAIT, span

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Outermost first: the ranks of the last axis are neighbours, and talk most."""
DATA = ("replicate", "shard")
"""The axes whose ranks see different samples."""
TOKENS = (*DATA, "context")
TOGETHER = (DATA, ("shard", "context"), ("replicate", "context"), TOKENS, ("context", "tensor"), (*TOKENS, "tensor"), (*TOKENS, "pipeline"))
"""Axes along which groups are made from the beginning: later, ranks that need none would not be there to make them with the others."""

PATIENCE = timedelta(days=7)
"""How long the control and saving groups wait: a rank that has died is noticed at once, by its closed connection."""
SPLIT = ("zb-h1", "zb-h2", "zbv", "dualpipev")
"""Schedules that put weight gradients off."""

_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_scatter_sum: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
SHARED: dict[Any, Callable[..., Shared]] = {
    (dist.all_reduce, None): Line.sum,
    (dist.all_reduce, dist.ReduceOp.MAX): Line.max,
    (_gather, None): Line.gather,
    (_scatter_sum, None): Line.scatter_sum,
}
"""The collectives that have a way through shared memory."""


class Pending:
    """A collective that is under way; `wait` before touching its tensors. Raises `Stall` where other ranks do not come in time."""

    def __init__(self, *works: Any, group: Group | None = None, what: str = "", after: Callable[[], Any] = lambda: None) -> None:
        """after: what is left to do when it is over."""
        self._works, self._group, self._what, self._after = works, group, what, after

    @property
    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        if self._works and self._group is not None:
            with span(STARVED if self._what.startswith("receive") else WAIT):
                self._group.doing.wait(self._works, f"{self._what} {self._group.words}")
            self._after()
        self._works = ()


@dataclass(frozen=True)
class Group:
    """Ranks that lie on a line of the mesh, and their collectives; in a group of one they cost nothing."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    """This process's place among them."""
    handle: Any = None
    axes: str = field(default="", compare=False)
    """Along which they lie, for people."""
    doing: Doing = field(default_factory=Doing, compare=False, repr=False)
    line: Line | None = field(default=None, compare=False, repr=False)
    """What tensors on the host take where all ranks are of one machine."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    @cached_property
    def words(self) -> str:
        """Such as: over ranks 2, 3 (tensor)."""
        few = ", ".join(map(str, self.ranks)) if self.size <= 8 else f"{self.ranks[0]} ... {self.ranks[-1]}"
        return f"over ranks {few} ({self.axes})"

    def __post_init__(self) -> None:
        if self.size > 1:
            self.doing.enter(self.words)

    def sum(self, x: Tensor, out: Tensor | None = None) -> Pending:
        """Add up over the ranks, in place or in `out`."""
        if out is None:
            return self._start(dist.all_reduce, x)
        return self._start(dist.all_reduce, out, x) if self._shares(x) else self._start(dist.all_reduce, out.copy_(x))

    def max(self, x: Tensor) -> Pending:
        """The elementwise maximum, in place."""
        return self._start(dist.all_reduce, x, op=dist.ReduceOp.MAX)

    def gather(self, out: Tensor, x: Tensor) -> Pending:
        """Every rank's x, one behind the other along dimension 0 of `out`, which may have any strides."""
        if self.size == 1 and not _same_memory(out, x):
            out.copy_(x.reshape(out.shape))
        if self._shares(x):
            return self._start(_gather, out, x)
        if out.is_contiguous():
            return self._start(_gather, out.view(-1), x.reshape(-1))
        whole = torch.empty_like(out, memory_format=torch.contiguous_format)
        return self._start(_gather, whole.view(-1), x.reshape(-1), after=lambda: out.copy_(whole))

    def scatter_sum(self, out: Tensor, x: Tensor) -> Pending:
        """The sum over the ranks of the rank-th of `size` equal pieces of x along dimension 0, in the contiguous `out`."""
        if self.size == 1 and not _same_memory(out, x):
            out.copy_(x.reshape(out.shape))
        return self._start(_scatter_sum, out, x) if self._shares(x) else self._start(_scatter_sum, out.view(-1), x.reshape(-1))

    def _shares(self, x: Tensor) -> bool:
        """Whether a tensor goes through shared memory."""
        return self.line is not None and x.is_cpu

    def _start(self, collective: Any, *tensors: Any, after: Callable[[], Any] = lambda: None, **options: Any) -> Pending:
        if self.size == 1:
            return Pending()
        what = self._count(collective.__name__, tensors[-1], "output_split_sizes" in options)
        shared = SHARED.get((collective, options.get("op")))
        if self.line is not None and shared is not None and self._shares(tensors[-1]):
            # `.data`: autograd is told of what is written as little as by torch.distributed
            return Pending(shared(self.line, f"{what} {self.words}", *(x.data for x in tensors)), group=self, what=what)
        return Pending(collective(*tensors, group=self.handle, async_op=True, **options), group=self, what=what, after=after)

    def _count(self, name: str, x: Tensor | list[Tensor], uneven: bool = False) -> str:
        """Note a collective, of which every rank has to say the same; uneven: ranks bring different numbers of rows."""
        assert isinstance(x, Tensor)
        shape = ["any", *x.shape[1:]] if uneven else list(x.shape)
        return self.doing.count(self.words, f"{name} of {str(x.dtype).removeprefix('torch.')} {shape}")

    def send(self, x: Tensor, peer: int) -> Pending:
        """To the peer-th rank of the group."""
        return Pending(dist.isend(x, self.ranks[peer], self.handle), group=self, what=f"send to rank {self.ranks[peer]}")

    def receive(self, out: Tensor, peer: int) -> Pending:
        """What the peer-th rank of the group sends."""
        return Pending(dist.irecv(out, self.ranks[peer], self.handle), group=self, what=f"receive from rank {self.ranks[peer]}")

    def shift(self, out: Tensor, x: Tensor) -> Pending:
        """Send the contiguous x to the next rank of the ring, and receive the former one's in `out`."""
        if self.size == 1:
            out.copy_(x)
            return Pending()
        following, former = (self.ranks[(self.rank + step) % self.size] for step in (1, -1))
        sending = dist.P2POp(dist.isend, x, following, self.handle)
        receiving = dist.P2POp(dist.irecv, out, former, self.handle)
        first, second = (sending, receiving) if self.rank % 2 == 0 else (receiving, sending)
        what = self._count("shift", x)
        return Pending(*dist.batch_isend_irecv([first, second]), group=self, what=what)

    def exchange(self, out: Tensor, x: Tensor, came: list[int] | None = None, sent: list[int] | None = None) -> Pending:
        """Of the contiguous x the i-th of `size` pieces goes to rank i; `out` holds what came, in rank order.

        came, sent: rows of dimension 0 from and to each rank; None = equal pieces.
        """
        if self.size == 1:
            out.view(-1).copy_(x.view(-1))
        if came is None:
            return self._start(dist.all_to_all_single, out.view(-1), x.view(-1))
        return self._start(dist.all_to_all_single, out, x, output_split_sizes=came, input_split_sizes=sent)

    def gather_bytes(self, text: bytes) -> list[bytes]:
        """Every rank's bytes (of any length), in rank order; through host memory."""
        if self.size == 1:
            return [text]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        self._start(dist.all_gather, sizes, torch.tensor([len(text)])).wait()
        mine = torch.zeros(max(1, *(int(size) for size in sizes)), dtype=torch.uint8)
        if text:
            mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in self.ranks]
        self._start(dist.all_gather, everyone, mine).wait()
        return [bytes(found[: int(size)].numpy()) for found, size in zip(everyone, sizes, strict=True)]


@dataclass
class Mesh:
    """Every rank's place on the axes. `Mesh()` is a single process; larger ones are made by all ranks together, in the same order."""

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    rank: int = 0
    doing: Doing = field(default_factory=Doing, repr=False)
    """What this rank is at."""
    timeout: timedelta = TIMEOUT
    """How long its groups wait, but for that of all ranks, which `connect` has made."""
    host: Host | None = field(default=None, init=False, repr=False)
    """The ranks of this machine, where there are several."""
    _groups: dict[Any, Group] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.sizes = {axis: self.sizes.get(axis, 1) for axis in AXES}
        self.host = self._meet()
        for axes in (*((axis,) for axis in AXES), *TOGETHER, AXES):
            self.group(*axes)

    def _meet(self) -> Host | None:
        if self.world == 1 or not dist.is_initialized():
            return None
        return meet(self.rank, Group(tuple(range(self.world)), self.rank, axes="all").gather_bytes, self.timeout)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes.values())

    @property
    def all(self) -> Group:
        return self.group(*AXES)

    @property
    def control(self) -> Group:
        """All ranks, for what one may do while the others wait long: preparing data, verifying a checkpoint, writing unequal shares."""
        return self._patient("control", self.doing)

    @property
    def saving(self) -> Group:
        """The same ranks, for the thread that writes checkpoints: no communicator serves two threads."""
        return self._patient("saving", Doing())

    def _patient(self, name: str, doing: Doing) -> Group:
        if name not in self._groups:
            ranks = tuple(range(self.world))
            handle = dist.new_group(ranks, timeout=PATIENCE, backend="gloo") if self.world > 1 else None
            self._groups[name] = Group(ranks, self.rank, handle, name, doing)
        return self._groups[name]

    @property
    def data(self) -> Group:
        """The ranks that hold the same piece of the model and see different samples."""
        return self.group(*DATA)

    @property
    def context(self) -> Group:
        """The ranks that hold the same piece of the model and see parts of the same samples."""
        return self.group("context")

    @property
    def tensor(self) -> Group:
        return self.group("tensor")

    def group(self, *axes: str) -> Group:
        """The ranks that differ from this one on these axes only."""
        longer = tuple(axis for axis in AXES if axis in axes and self.sizes[axis] > 1)
        return self._group(longer, self._lines(longer))

    def another(self, axis: str) -> Group:
        """The ranks of `group(axis)` once more, with a communicator of their own."""
        return self._group((axis, "another"), self._lines((axis,)), own=True)

    def among(self, axis: str, places: Sequence[int]) -> Group:
        """Of the ranks along an axis those at some places; a group of one for the others."""
        chosen = [[line[place] for place in places] for line in self._lines((axis,))]
        group = self._group((axis, tuple(places)), chosen) if len(places) > 1 else None
        return group or self.group()

    def experts(self, count: int, sequence: bool) -> Group:
        """`count` ranks of a stage with different tokens, side by side: those that share the experts of a layer."""
        axes = _token_axes(sequence)
        runs = (line[first : first + count] for line in self._lines(axes) for first in range(0, len(line), count))
        return self._group((axes, count, "experts"), runs)

    def expert_copies(self, count: int, sequence: bool) -> Group:
        """The ranks that hold the same of `count` shares of the experts."""
        axes = _token_axes(sequence)
        strides = (line[first::count] for line in self._lines(axes) for first in range(count))
        return self._group((axes, count, "copies"), strides)

    def neighbours(self, axis: str, count: int) -> Group:
        """`count` ranks that lie side by side on an axis, this one among them."""
        if count in (1, self.sizes[axis]):
            return self.group(axis) if count > 1 else self.group()
        runs = (line[first : first + count] for line in self._lines((axis,)) for first in range(0, len(line), count))
        return self._group((axis, count), runs)

    def _lines(self, axes: tuple[str, ...]) -> Iterator[list[int]]:
        """All groups along some axes, in an order that is the same on every rank."""
        others = [axis for axis in AXES if axis not in axes]
        for fixed in itertools.product(*(range(self.sizes[axis]) for axis in others)):
            along = itertools.product(*(range(self.sizes[axis]) for axis in axes))
            yield [self._number(dict(zip((*others, *axes), (*fixed, *moving), strict=True))) for moving in along]

    def _number(self, place: dict[str, int]) -> int:
        """The rank at a place: the last axis runs fastest."""
        number = 0
        for axis in AXES:
            number = number * self.sizes[axis] + place[axis]
        return number

    def _group(self, key: tuple[Any, ...], lines: Iterable[list[int]], own: bool = False) -> Group:
        if key not in self._groups:
            self._groups[key] = Group((self.rank,), 0)
            for ranks in lines:
                # Every rank makes every group; that of all ranks is there already.
                apart = len(ranks) > 1 and (own or len(ranks) < self.world)
                handle = dist.new_group(ranks, timeout=self.timeout) if apart else None
                if self.rank in ranks:
                    place = ranks.index(self.rank)
                    line = None if self.host is None else self.host.line(ranks, place)
                    self._groups[key] = Group(tuple(ranks), place, handle, " ".join(map(str, key)), self.doing, line)
        return self._groups[key]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _token_axes(sequence: bool) -> tuple[str, ...]:
    """The axes whose ranks have different tokens: tensor ranks do when the sequence is cut over them."""
    return (*DATA, "context", "tensor") if sequence else (*DATA, "context")


def mesh_sizes(parallel: ParallelConfig, world: int, model: ModelConfig | None = None) -> dict[str, int]:
    """The degree of every axis for `world` processes.

    Raises `UserError` when they do not divide, naming those that do; with a model only those that suit it, too.
    """
    inner = parallel.pipeline * parallel.tensor * parallel.context
    if world % inner:
        raise UserError(_uneven(parallel, world, model))
    data, sharded = world // inner, parallel.shard != "none"
    replicate = parallel.replicate or (1 if sharded else data)
    if not sharded and replicate != data:
        raise UserError(
            f"parallel.replicate = {replicate} with parallel.shard = none, where all {data} data ranks are copies: "
            "leave parallel.replicate out, or say what is sharded, such as --parallel.shard optimizer"
        )
    if data % replicate:
        raise UserError(
            f"parallel.replicate = {replicate} does not divide the {data} data ranks ({world} processes, {inner} of which share a sample): "
            f"choose --parallel.replicate {_listed(_divisors(data))}"
        )
    tokens = _token_ranks(parallel, world)
    if tokens % parallel.expert:
        possible = [n for n in _divisors(tokens) if model is None or model.experts % n == 0]
        raise UserError(
            f"parallel.expert = {parallel.expert} does not divide the {tokens} ranks with different tokens (data x context"
            f"{' x tensor' if parallel.sequence else ''}): choose --parallel.expert {_listed(possible)}"
        )
    sizes = {"replicate": replicate, "shard": data // replicate, "context": parallel.context, "tensor": parallel.tensor}
    return {"pipeline": parallel.pipeline, **sizes}


def _uneven(parallel: ParallelConfig, world: int, model: ModelConfig | None) -> str:
    """What is wrong with degrees that do not divide the processes, and what to type instead."""
    degrees = {axis: getattr(parallel, axis) for axis in ("pipeline", "context", "tensor") if getattr(parallel, axis) > 1}
    inner = math.prod(degrees.values())
    named = " x ".join(f"parallel.{axis} = {degree}" for axis, degree in degrees.items()) + (f" = {inner}" if len(degrees) > 1 else "")
    instead = f"start --nproc {-(-world // inner) * inner} (torchrun or srun: as many), or choose "
    if len(degrees) > 1:
        instead += f"degrees whose product is {_listed(_divisors(world))}"
    else:
        (axis,) = degrees
        most = {"pipeline": model.layers + 2}.get(axis, world) if model is not None else world
        possible = [n for n in _divisors(world) if n <= most and (axis != "tensor" or model is None or _cuts(model, n))]
        instead += f"--parallel.{axis} {_listed(possible)}"
    if world < inner:
        return f"{named} needs {inner} processes, there {'is' if world == 1 else 'are'} {world}: {instead}"
    return f"{named} does not divide the {world} processes: {instead}"


def _token_ranks(parallel: ParallelConfig, world: int) -> int:
    """Ranks of a stage with different tokens."""
    return world // (parallel.pipeline * (1 if parallel.sequence else parallel.tensor))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    """Such as 1, 2 or 4."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_layout(model: ModelConfig, parallel: ParallelConfig, world: int = 0) -> None:
    """Raise `UserError` for degrees that the model cannot be cut into, naming those that it can.

    world: the number of processes, which what is named has to divide as well; 0 = any.
    """
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence = true needs parallel.tensor of at least 2: raise it, or leave parallel.sequence out")
    check_cut(model, parallel.tensor, f"parallel.tensor = {parallel.tensor}", world // (parallel.pipeline * parallel.context))
    if parallel.expert > 1 and (not model.experts or model.experts % parallel.expert):
        possible = [n for n in _divisors(model.experts) if _token_ranks(parallel, world) % n == 0]
        instead = f"choose --parallel.expert {_listed(possible)}" if possible else "set model.experts, or leave it out"
        raise UserError(f"parallel.expert = {parallel.expert} does not divide model.experts = {model.experts}: {instead}")
    if parallel.pipeline > 1 and parallel.schedule in SPLIT and parallel.shard in ("gradients", "parameters"):
        raise UserError(
            f"parallel.schedule = {parallel.schedule} puts weight gradients off, which parallel.shard = {parallel.shard} would gather and "
            "reduce twice: choose parallel.shard optimizer or none, or schedule 1f1b, gpipe or interleaved"
        )
    if parallel.context > 1 and model.family == "xlnet":
        raise UserError(
            f"parallel.context = {parallel.context} cuts samples, and model.family = xlnet attends by distances within whole ones: "
            "choose --parallel.tensor with --parallel.sequence instead, or --parallel.context 1"
        )
    if parallel.context > 1 and parallel.context_method == "ring" and model.position == "relative":
        raise UserError(
            "parallel.context_method = ring has no biases of scores, which model.position = relative is: choose "
            "--parallel.context_method all_to_all"
        )
    if parallel.context > 1 and parallel.context_method == "all_to_all":
        heads = model.heads // parallel.tensor
        pairs = max(1, model.key_value_heads // parallel.tensor)
        if heads % parallel.context or (pairs % parallel.context and parallel.context % pairs):
            rest = world // (parallel.pipeline * parallel.tensor)
            possible = [n for n in _divisors(heads) if (pairs % n == 0 or n % pairs == 0) and rest % n == 0]
            raise UserError(
                f"parallel.context = {parallel.context} does not divide the {heads} heads of a tensor rank, which all_to_all shares: "
                f"choose --parallel.context {_listed(possible)}, or --parallel.context_method ring"
            )


def check_cut(model: ModelConfig, ranks: int, named: str, world: int = 0) -> None:
    """Raise `UserError` unless a model can be cut over so many tensor ranks.

    named: how the user asks for them. world: what the choices named have to divide; 0 = anything.
    """
    if not _cuts(model, ranks):
        possible = [n for n in _divisors(model.heads) if _cuts(model, n) and world % n == 0]
        more = f", shared experts {model.shared_experts} x {model.expert_width}" if model.shared_experts else ""
        more += f", vocabulary {model.vocab_size}" if model.vocab_size else ""
        raise UserError(
            f"{named} does not divide the model (model.heads = {model.heads}, model.kv_heads = {model.key_value_heads}, "
            f"feed-forward width {model.ffn_width}{more}): choose {_listed(possible)}"
        )


def describe_layout(sizes: Mapping[str, int], parallel: ParallelConfig) -> str:
    """Such as `8 processes: pipeline 2 (1f1b) x shard 2 (optimizer) x tensor 2`."""
    notes = {
        "pipeline": parallel.schedule,
        "shard": parallel.shard,
        "context": parallel.context_method,
        "tensor": "sequence" if parallel.sequence else "",
    }
    axes = [f"{axis} {n}" + (f" ({notes[axis]})" if notes.get(axis) else "") for axis, n in sizes.items() if n > 1]
    experts = f", expert {parallel.expert}" if parallel.expert > 1 else ""
    return f"{math.prod(sizes.values())} processes: {' x '.join(axes)}{experts}"


def _cuts(model: ModelConfig, ranks: int) -> bool:
    pairs = model.key_value_heads
    shared = pairs % ranks == 0 or ranks % pairs == 0  # fewer key/value heads than ranks: several ranks hold the same one
    widths = (model.heads, model.ffn_width, model.shared_experts * model.expert_width)
    return all(width % ranks == 0 for width in widths) and shared and (model.vocab_size or ranks) >= ranks
