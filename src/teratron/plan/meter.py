"""A meter of everything that runs under it, on real or fake tensors: memory, operations and bytes moved by kind, messages."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
ACTIVATIONS, COMMUNICATION = "activations", "communication"
"""Kinds of memory that nobody has labelled: what is computed, and buffers of collectives."""
PRODUCTS, ATTENTION, ELEMENTWISE, OPTIMIZER = "products", "attention", "elementwise", "optimizer"
"""Kinds of work; elementwise is all that is neither."""
ATTENDING = {
    aten.bmm,
    aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
"""Products that only attention has: those of weights are never in batches."""
MULTIPLYING = {aten.mm, aten.addmm, aten.addmm_, aten._scaled_mm}
PICKING = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""They read as much as they write, and the numbers that say what."""
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, torch.ops.prim.device}
"""They touch no memory; the last one asks a tensor where it lies."""
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}
"""They do not read what they change."""


class Message(NamedTuple):
    """Collectives that are alike, seen from one rank."""

    what: str
    """Such as all-gather."""
    axes: str
    """The axes of the mesh along which its ranks lie."""
    ranks: int


@dataclass
class Reading:
    """What a meter has counted."""

    memory: Counter[str] = field(default_factory=Counter)
    """Bytes that are held, by kind."""
    flops: Counter[str] = field(default_factory=Counter)
    """Floating-point operations, by kind of work."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes that operations read and write, by kind of work."""
    calls: Counter[Message] = field(default_factory=Counter)
    volume: Counter[Message] = field(default_factory=Counter)
    """Bytes of the whole tensors that are gathered, summed or sent."""
    sent: Counter[Message] = field(default_factory=Counter)
    """Bytes that leave this rank, by ring algorithms."""

    def copy(self) -> Reading:
        return Reading(*(counter.copy() for counter in self._counters()))

    def add(self, other: Reading, sign: int = 1) -> None:
        for mine, theirs in zip(self._counters(), other._counters(), strict=True):
            for name, count in theirs.items():
                mine[name] += sign * count

    def _counters(self) -> tuple[Counter[Any], ...]:
        return self.memory, self.flops, self.moved, self.calls, self.volume, self.sent


@dataclass(frozen=True)
class Deed:
    """What something did to a meter, so that it can be done again on paper."""

    change: Reading
    peak: Counter[str]
    """Memory by kind at its worst moment, above what there was before."""


class Meter(TorchDispatchMode):
    """Sees every operation: storages that are born and die, matrix products. Messages are told to it by `imagined` groups."""

    def __init__(self) -> None:
        super().__init__()
        self.now = Reading()
        self.peak: Counter[str] = Counter()
        """Memory by kind when there was the most."""
        self._work = ""
        self._held = self._worst = 0
        self._storages: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        work = self._work or work_of(func.overloadpacket)
        self.now.flops[work] += flops_of(func.overloadpacket, args)
        self.now.moved[work] += bytes_of(func, args, kwargs or {}, out)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.see(value)
        return out

    def __enter__(self) -> Meter:
        self._resize = torch.UntypedStorage.resize_
        meter, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            meter._resized(storage)
            return done

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]  # no operation, so the dispatcher does not see it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    @contextmanager
    def working(self, work: str) -> Iterator[None]:
        """All that is done within is of this kind of work."""
        self._work = work
        yield
        self._work = ""

    def see(self, tensor: Tensor, kind: str = ACTIVATIONS) -> None:
        """Count a tensor's memory, unless it is counted already."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self._storages[key] = weakref.ref(storage, lambda _: self._died(key)), kind, size
            self._add(kind, size)

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """From now on their memory is of this kind, unless it has a label already."""
        for tensor in tensors:
            self.see(tensor)
            key = tensor.untyped_storage()._cdata
            storage, old, size = self._storages[key]
            if old == ACTIVATIONS:
                self._storages[key] = storage, kind, size
                self.now.memory[old] -= size
                self.now.memory[kind] += size

    def message(self, what: str, axes: str, ranks: int, volume: int, sent: float) -> None:
        """Count a collective; volume and sent in bytes, see `Reading`."""
        message = Message(what, axes, ranks)
        self.now.calls[message] += 1
        self.now.volume[message] += volume
        self.now.sent[message] += round(sent)

    def restart(self) -> None:
        """Forget all but the memory that is held."""
        self.now = Reading(memory=self.now.memory)
        self.peak, self._worst = self.now.memory.copy(), self._held

    def watch(self, action: Callable[[], None]) -> Deed:
        """Do something, and tell what it did."""
        before, peak, worst = self.now.copy(), self.peak, self._worst
        self.peak, self._worst = self.now.memory.copy(), self._held
        action()
        change = self.now.copy()
        change.add(before, -1)
        above = self.peak.copy()
        above.subtract(before.memory)
        if self._worst < worst:
            self.peak, self._worst = peak, worst
        return Deed(change, above)

    def repeat(self, deed: Deed) -> None:
        """Count something as if it were done again."""
        worst = self._held + deed.peak.total()
        if worst > self._worst:
            self._worst, self.peak = worst, self.now.memory.copy()
            self.peak.update(deed.peak)
        self.now.add(deed.change)
        self._held += deed.change.memory.total()

    def _add(self, kind: str, size: int) -> None:
        self._held += size
        self.now.memory[kind] += size
        if self._held > self._worst:
            self._worst, self.peak = self._held, self.now.memory.copy()

    def _died(self, key: int) -> None:
        _, kind, size = self._storages.pop(key)
        self._add(kind, -size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages:
            known, kind, size = self._storages[storage._cdata]
            self._storages[storage._cdata] = known, kind, storage.nbytes()
            self._add(kind, storage.nbytes() - size)


def work_of(packet: Any) -> str:
    """The kind of work that an operation is by itself."""
    return ATTENTION if packet in ATTENDING else PRODUCTS if packet in MULTIPLYING else ELEMENTWISE


def bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes, each tensor once; views and empty tensors move none."""
    packet = func.overloadpacket
    if func.is_view or packet in EMPTY:
        return 0
    read = written = 0
    storages = set()
    for place, argument in enumerate(func._schema.arguments):
        for tensor in _tensors(args[place] if place < len(args) else kwargs.get(argument.name)):
            storages.add(tensor.untyped_storage()._cdata)
            changed = argument.alias_info is not None and argument.alias_info.is_write
            written += changed * _size(tensor)
            read += (not changed or (packet not in OVERWRITING and argument.name != "out")) * _size(tensor)
    made = sum(_size(tensor) for tensor in _tensors(out) if tensor.untyped_storage()._cdata not in storages)
    return 2 * made if packet in PICKING else read + written + made


def _tensors(value: Any) -> list[Tensor]:
    several = value if isinstance(value, (tuple, list)) else (value,)
    return [one for one in several if isinstance(one, Tensor) and one.device.type != "meta"]


def _size(tensor: Tensor) -> int:
    """Bytes; what an expanded tensor repeats counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def flops_of(packet: Any, args: tuple[Any, ...]) -> int:
    """Floating-point operations of matrix products, two for each multiplication; of causal attention the half that is not masked."""
    if packet in (aten.mm, aten.bmm, aten._scaled_mm):
        return 2 * args[0].numel() * int(args[1].shape[-1])
    if packet in (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_):
        return 2 * args[1].numel() * int(args[2].shape[-1])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention(args[0], args[1], 2, args[4] if len(args) > 4 else False)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _attention(args[1], args[2], 5, args[7])  # the scores are made again
    return 0


def _attention(q: Tensor, k: Tensor, products: int, causal: bool) -> int:
    """Of so many products between queries [B, N, S, D] and keys [B, K, T, D], or as large as that."""
    return 2 * products * q.numel() * int(k.shape[2]) // (2 if causal else 1)
