"""Silent corruption: what several ranks hold of a run's state must be the same bits, and a step computed twice the same gradients."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from teratron.checkpoint.agree import gather_json
from teratron.objectives import Batch
from teratron.parallel.boxes import Box
from teratron.parallel.buckets import Bucket
from teratron.parallel.mesh import Group
from teratron.train.engine import Engine

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**18
"""Elements hashed at once."""
ODD = 0x5851F42D4C957F2D
"""A multiplier of linear congruential generators modulo 2^64 (Knuth's MMIX)."""


@dataclass(frozen=True)
class Difference:
    """Copies that are not the same."""

    ranks: tuple[int, ...]
    """Those that are outvoted by their copies; all that differ, where no majority says who is wrong."""
    outvoted: bool
    names: tuple[str, ...]
    """What they hold otherwise, such as `weight/blocks.1.ffn.up.weight`."""


def compare_copies(engine: Engine) -> Difference | None:
    """Compare all weights and moments that several ranks hold, bit for bit by their digests; a collective, the same on every rank."""
    held = dict(_held(engine))
    keys = {_key(name, boxes): name for name, boxes in held}
    digests = torch.tensor(list(map(int, [digest(values) for values in held.values()])), dtype=torch.int64)
    found = _gather(engine.mesh.control, keys, digests)
    different = {key: ranks for key, ranks in found.items() if len(set(ranks.values())) > 1}
    if not different:
        return None
    blamed = [_outvoted(ranks) for ranks in different.values()]
    ranks = {rank for some in blamed for rank in some} or {rank for ranks in different.values() for rank in ranks}
    mine = [keys[key] for key in different if key in keys]
    names = {name for some in gather_json(engine.mesh.control, mine) for name in some}
    return Difference(tuple(sorted(ranks)), any(blamed), tuple(sorted(names)))


def repeat_step(engine: Engine, batch: Batch, step: int, loss_scale: float) -> list[int]:
    """Compute a step's gradients twice: the ranks whose own, before any sum over ranks, differ. A collective, which changes nothing."""
    first, second = (_gradients(engine, batch, step, loss_scale) for _ in range(2))
    return [rank for rank, same in enumerate(gather_json(engine.mesh.control, first == second)) if not same]


def digest(values: Tensor) -> Tensor:
    """64 bits of a tensor, an int64 scalar on its device, the same for the same bits; the change of any one element changes it."""
    bits = values.detach().reshape(-1).view(INTEGERS[values.element_size()])
    factors = torch.arange(min(CHUNK, len(bits)), device=values.device) * ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in bits.split(CHUNK):
        total = total * ODD + (part * factors[: len(part)]).sum()
    return total


def _held(engine: Engine) -> Iterator[tuple[tuple[str, tuple[Box, ...]], Tensor]]:
    """What this rank holds of the training state, and the weights that it computes with, where these are other numbers."""
    for piece in engine.optimizer.pieces():
        yield (piece.name, piece.boxes), piece.values
    engine.flat.release()  # waits for what is being gathered
    for bucket in engine.flat.buckets:
        if bucket.sharding.keep_weights and (bucket.owners.size > 1 or bucket.master is not bucket.shard):
            for span in bucket.spans:
                part = span.part
                yield (f"used/{part.name}", (Box(part.offset, part.size),)), bucket.weights[span.start : span.stop]


def _key(name: str, boxes: tuple[Box, ...]) -> int:
    text = f"{name} {[(box.offset, box.size) for box in boxes]}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _gather(group: Group, keys: dict[int, str], digests: Tensor) -> dict[int, dict[int, int]]:
    """By key, the digest of each rank that holds it."""
    table = np.stack([np.array(list(keys), np.int64), digests.numpy()])
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, text in enumerate(group.gather_bytes(table.tobytes())):
        for key, value in np.frombuffer(text, np.int64).reshape(2, -1).T.tolist():
            found[key][rank] = value
    return found


def _outvoted(ranks: dict[int, int]) -> list[int]:
    """Those whose digest is not that of the majority; none where there is no majority."""
    values = list(ranks.values())
    common = max(set(values), key=values.count)
    return [rank for rank, value in ranks.items() if value != common] if 2 * values.count(common) > len(values) else []


def _gradients(engine: Engine, batch: Batch, step: int, loss_scale: float) -> int:
    """The digest of this rank's gradients of a step."""
    digests: list[Tensor] = []

    def watch(bucket: Bucket, gradient: Tensor) -> None:
        digests.append(digest(gradient))

    engine.flat.watch = watch
    try:
        engine.passes(batch, step=step, loss_scale=loss_scale)
    finally:
        engine.flat.watch = None
        engine.flat.clear()
    return int(digest(torch.stack(digests)))
