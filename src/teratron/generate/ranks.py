"""Generation by several processes that share one model, tensor-parallel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from teratron.parallel.device import choose_device
from teratron.parallel.mesh import Mesh
from teratron.parallel.worker import Worker, connect, disconnect, telling


@contextlib.contextmanager
def joined(worker: Worker | None, device: str) -> Iterator[tuple[Mesh, torch.device]]:
    """All ranks on the tensor axis, and this one's device; None = a single process."""
    place = choose_device(device, worker)
    if worker is None:
        yield Mesh(), place
        return
    connect(worker, place)
    try:
        yield Mesh({"tensor": worker.world}, worker.rank, telling()), place
    finally:
        disconnect()
