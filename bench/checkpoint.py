"""`python bench/checkpoint.py`: bytes and seconds of saving and loading, and how long training stands still, beside torch.save; medians."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import add_line, facts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from teratron.checkpoint import TrainingState, load_training, open_checkpoint
from teratron.checkpoint.machines import Machines
from teratron.checkpoint.manifest import whole
from teratron.config import Config, UserError
from teratron.parallel.boxes import Piece
from teratron.parallel.mesh import Mesh
from teratron.train.device import keep_freed_memory
from teratron.train.metrics import Silence
from teratron.train.saving import Place, Saver

ROW = 1024
"""Features of the state's matrices, in float32."""
Found = dict[str, dict[str, float]]
"""By contender: bytes, seconds of a save, of which training stands still, seconds of a load."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=128, help="size of the state (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over them (default: 3)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's for temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    args = parser.parse_args()
    if args.mib < 12 or args.rounds < 1:
        parser.error("expected --mib of at least 12 and --rounds of at least 1")
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found = measure(Path(folder), args.mib, args.rounds)
        Console().print(table(found, args.mib))
        if args.json:
            add_line(args.json, {**facts("cpu"), "mib": args.mib, "medians": found})
    except UserError as error:
        print(f"bench/checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(folder: Path, mib: int, rounds: int) -> Found:
    """Medians of the rounds; one more before warms memory and is dropped."""
    keep_freed_memory()
    pieces = state(mib)
    cases: dict[str, Callable[[Path], dict[str, float]]] = {
        "torch.save": lambda place: plain(place, pieces, synced=False),
        "torch.save, flushed to disk": lambda place: plain(place, pieces, synced=True),
        "teratron, waiting": lambda place: ours(place, pieces, asynchronous=False),
        "teratron, beside training": lambda place: ours(place, pieces, asynchronous=True),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for number, (name, case) in enumerate(cases.items()):
            os.sync()  # nobody pays for what another has left to write
            result = case(folder / str(number))
            if turn:
                found[name].append(result)
    return {name: {key: median(result[key] for result in results) for key in results[0]} for name, results in found.items()}


def state(mib: int) -> list[Piece]:
    """Weights and two moments of 8 matrices each, as a single process holds them."""
    rows = mib * 2**20 // (3 * 8 * ROW * 4)
    names = [f"{kind}/blocks.{layer}.weight" for kind in ("weight", "moment1", "moment2") for layer in range(8)]
    return [Piece(name, (rows, ROW), (whole((rows, ROW)),), torch.randn(rows * ROW)) for name in names]


def plain(place: Path, pieces: list[Piece], synced: bool) -> dict[str, float]:
    """One file of torch.save, all at once."""
    tensors = {piece.name: piece.values for piece in pieces}
    place.mkdir(exist_ok=True)
    path = place / "state.pt"
    begun = time.perf_counter()
    with path.open("wb") as file:
        torch.save(tensors, file)
        if synced:
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    for piece in blank(pieces):
        piece.values.copy_(loaded[piece.name])
    return {"bytes": path.stat().st_size, "save": seconds, "stall": seconds, "load": time.perf_counter() - begun}


def ours(place: Path, pieces: list[Piece], asynchronous: bool) -> dict[str, float]:
    """The Trainer's way: written, hashed, flushed, read back from the disk, published; loading checks every hash."""
    place.mkdir(exist_ok=True)
    config = Config().override({"checkpoint.asynchronous": asynchronous, "checkpoint.keep": 1})
    notes = Notes()
    with Saver(place, config, Mesh(), Machines(0, 1, 1), notes, lambda text: None, lambda: None) as saver:
        saver.save(Place.DISK, pieces, TrainingState(1), {})
        saver.finish()
    event = notes.event
    folder = place / "checkpoints" / "step-00000001"
    begun = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    load_training(checkpoint, blank(pieces))
    load = time.perf_counter() - begun
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"bytes": size, "save": event["seconds"], "stall": event["stall"], "load": load}


class Notes(Silence):
    """Keeps the last event."""

    event: dict[str, Any]

    def write(self, event: str, **values: Any) -> None:
        self.event = values


def blank(pieces: list[Piece]) -> list[Piece]:
    """The memory that a load fills."""
    return [Piece(piece.name, piece.shape, piece.boxes, torch.zeros_like(piece.values)) for piece in pieces]


def table(found: Found, mib: int) -> Table:
    """One line a contender."""
    shown = Table(title=f"a state of {mib} MiB")
    for title in ("", "MiB written", "save, s", "training stands still, s", "of the save", "load, s"):
        shown.add_column(title, justify="right" if title else "left")
    for name, result in found.items():
        cells = [f"{result['bytes'] / 2**20:,.1f}", f"{result['save']:.3f}", f"{result['stall']:.3f}"]
        shown.add_row(name, *cells, f"{result['stall'] / result['save']:.1%}", f"{result['load']:.3f}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
