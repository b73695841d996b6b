"""What ranks hold of a training state, for tests: whole, or cut at random; and ranks that are threads of this process."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from teratron.parallel.boxes import Box, Piece, boxes_of
from teratron.parallel.mesh import Group

T = TypeVar("T")


def full(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def whole_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """As a single process holds them."""
    return [Piece(name, tuple(tensor.shape), (full(tensor.shape),), tensor.reshape(-1)) for name, tensor in tensors.items()]


def cut_pieces(tensors: Mapping[str, Tensor], ranks: int, draw: random.Random) -> list[list[Piece]]:
    """A random layout: each rank's pieces. Tensors are cut in a dimension, the cuts flattened and their range cut again anywhere,
    dealt to random ranks, some of them to several of which the first saves; a rank may hold much of a tensor, or nothing."""
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, tensor in tensors.items():
        for box in _slabs(tuple(tensor.shape), draw):
            stops = sorted({draw.randrange(box.count + 1) for _ in range(draw.randrange(ranks + 1))} | {0, box.count})
            for start, stop in itertools.pairwise(stops):
                boxes = tuple(boxes_of(box, start, stop))
                values = torch.cat([tensor[part.slices()].reshape(-1) for part in boxes])
                holders = draw.sample(range(ranks), draw.choice([1, 1, min(2, ranks)]))
                for rank in holders:
                    held[rank].append(Piece(name, tuple(tensor.shape), boxes, values.clone(), rank == holders[0]))
    for pieces in held:
        draw.shuffle(pieces)
    return held


def _slabs(shape: tuple[int, ...], draw: random.Random) -> list[Box]:
    """A tensor cut in one of its dimensions, or not at all."""
    if not shape or draw.random() < 0.3:
        return [full(shape)]
    dimension = draw.randrange(len(shape))
    stops = sorted({0, draw.randrange(shape[dimension] + 1), shape[dimension]})
    return [
        Box((*(0,) * dimension, a, *(0,) * (len(shape) - dimension - 1)), (*shape[:dimension], b - a, *shape[dimension + 1 :]))
        for a, b in itertools.pairwise(stops)
    ]


def blank(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces in memory full of NaN."""
    return [dataclasses.replace(piece, values=torch.full_like(piece.values, torch.nan)) for piece in pieces]


class Meeting:
    """Where threads exchange bytes; when one has left that others wait for, they raise instead of waiting for ever."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.rounds: list[dict[int, bytes]] = []
        self.gone: set[int] = set()

    def exchange(self, rank: int, text: bytes) -> list[bytes]:
        with self.changed:
            number = sum(rank in texts for texts in self.rounds)
            if number == len(self.rounds):
                self.rounds.append({})
            texts = self.rounds[number]
            texts[rank] = text
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(texts) == self.size or self.gone - texts.keys())
            if len(texts) < self.size:
                raise RuntimeError(f"rank {rank} waits for ranks that have left: {self.gone - texts.keys()}")
            return [texts[other] for other in range(self.size)]

    def leave(self, rank: int) -> None:
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


@dataclass(frozen=True)
class ThreadGroup(Group):
    """A rank that is a thread."""

    meeting: Any = None

    def gather_bytes(self, text: bytes) -> list[bytes]:
        return self.meeting.exchange(self.rank, text)


def on_ranks(size: int, action: Callable[[Group], T]) -> list[T | BaseException]:
    """Run an action as every rank of a group at the same time; what each returned or raised."""
    meeting = Meeting(size)

    def run(rank: int) -> T | BaseException:
        try:
            return action(ThreadGroup(tuple(range(size)), rank, None, meeting=meeting))
        except BaseException as error:
            return error
        finally:
            meeting.leave(rank)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def succeed(results: Sequence[T | BaseException]) -> list[T]:
    """The results, where no rank raised."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
