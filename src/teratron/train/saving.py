"""Saving: when a run saves, where to (disk, memory, a second place), beside training, and from where it goes on."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from teratron.checkpoint import Checkpoint, TrainingState, newest_checkpoint, open_checkpoint, save_training, saved_state
from teratron.checkpoint.agree import agree
from teratron.checkpoint.background import Background
from teratron.checkpoint.copies import Copies
from teratron.checkpoint.format import check_space, saved_pieces
from teratron.checkpoint.machines import Machines
from teratron.checkpoint.memory import make_memory_folder, memory_folder, remove_memory
from teratron.checkpoint.reader import Candidate
from teratron.checkpoint.training import remove_old
from teratron.config import CheckpointConfig, Config, UserError
from teratron.parallel.boxes import Piece, nothing
from teratron.parallel.mesh import Mesh
from teratron.train.device import free_memory
from teratron.train.metrics import Metrics, Silence

FIRST = 10
"""Steps after which `checkpoint.every = auto` saves for the first time, to learn what it costs."""
DAY = 86400.0


class Place(enum.IntEnum):
    """Where a checkpoint goes; ranks agree on the greatest."""

    NOWHERE = 0
    MEMORY = 1
    DISK = 2


@dataclass
class Save:
    """One checkpoint under way."""

    place: Place
    state: TrainingState
    begun: float
    stall: float = 0.0
    """Seconds that training stood still for it."""
    seconds: float = 0.0
    """From its beginning until it was written, verified and in its place; 0 = not yet."""
    folder: Path = Path()


class Saver:
    """Saves a run from the first to the last step; a context, whose end waits for what is under way.

    All ranks call `save` after the same steps. With `checkpoint.asynchronous` it returns once the state is copied, and a thread writes:
    whether that has failed the trainer asks (`failed`) at each step's end.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        mesh: Mesh,
        machines: Machines,
        metrics: Metrics | Silence,
        say: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        """check: raises `UserError` where rank 0 may not write into the run any more."""
        self.run, self.config, self.mesh, self.machines = run, config, mesh, machines
        self._metrics, self._say, self._check = metrics, say, check
        self._leads = mesh.rank == 0
        self._writer = Background()
        self._save: Save | None = None
        """What is under way, or has not been told."""
        self._copier = Copier(config.checkpoint, run, metrics, say) if self._leads and config.checkpoint.copy_to else None
        self._interval = Interval(config.checkpoint, say)
        self._memory = memory_folder(run)
        _ = mesh.saving  # made here and now by all ranks, not by a thread while they make others

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a save has failed; `finish` then raises why."""
        return self._writer.failed

    def due(self, step: int) -> Place:
        """Where to save after a step. Rank 0 decides for all: the others may see another moment, and other seconds."""
        if not self._leads:
            return Place.NOWHERE
        config = self.config.checkpoint
        if self._interval.due(step) or (config.keep_every and step % config.keep_every == 0):
            return Place.DISK
        memory = config.memory_every and step % config.memory_every == 0 and not self._writer.busy
        return Place.MEMORY if memory else Place.NOWHERE

    def save(self, place: Place, pieces: list[Piece], state: TrainingState, data: dict[str, str]) -> None:
        """Begin to save, or save; a collective. Raises the same `UserError` on all ranks when this or the former save fails."""
        begun = time.perf_counter()
        self.finish()
        save = self._save = Save(place, state, begun)
        if self.config.checkpoint.asynchronous:
            held = snapshot(pieces)
            self._writer.start(lambda: self._write(save, held, data), f"saving step {state.step}")
        else:
            self._write(save, pieces, data)
        save.stall = time.perf_counter() - begun
        self.poll()

    def poll(self) -> None:
        """Tell of what has been done; waits for nothing."""
        save = self._save
        if save is not None and save.seconds and save.stall:
            self._save = None
            self._tell(save)
        if self._copier is not None:
            self._copier.poll()

    def finish(self) -> None:
        """Wait until nothing is being written; raises why the last save failed."""
        self.mesh.doing.at(0)  # which may take longer than any step
        self._writer.join()
        self.poll()

    def _write(self, save: Save, pieces: list[Piece], data: dict[str, str]) -> None:
        """Runs on a thread, with a group of its own."""
        group, run, config, machines = self.mesh.saving, self.run, self.config, None
        agree(group, lambda: self._check() if self._leads else None)
        if save.place == Place.MEMORY and self._memory is not None:
            run, machines = self._memory, self.machines
            config = config.override({"checkpoint.keep": 1, "checkpoint.keep_every": 0})
        tokenizer = self.run / "tokenizer"
        extra = [tokenizer] if tokenizer.is_dir() else []
        layout = {"ranks": self.mesh.world, **self.mesh.sizes, "sharded": config.parallel.shard}
        save.folder = save_training(run, config, pieces, save.state, extra, group, layout, data, machines)
        save.seconds = time.perf_counter() - save.begun

    def _tell(self, save: Save) -> None:
        step, place = save.state.step, save.place.name.lower()
        self._metrics.write("save", step=step, place=place, seconds=save.seconds, stall=save.stall, time=time.time())
        if save.place == Place.DISK:
            self._interval.learn(save)
            self._say(f"step {step}: saved {save.folder}")
            if self._copier is not None:
                self._copier.start(save.folder)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
            if self._copier is not None:
                self._copier.finish()
            if self.machines.leads:
                remove_memory(self.run)
        elif isinstance(error, UserError):  # else other ranks may never come, or the user wants to stop at once
            with contextlib.suppress(UserError):
                self.finish()


class Interval:
    """When the next checkpoint on disk is due."""

    def __init__(self, config: CheckpointConfig, say: Callable[[str], None]) -> None:
        self.config, self._say = config, say
        self.every = FIRST if config.every == "auto" else config.every
        self._last: int | None = None
        """Step of the last save, or before the first one here."""
        self._since = 0.0

    def due(self, step: int) -> bool:
        """Whether one is, after a step; asked after each."""
        if self._last is None or self._last >= step:  # the first one here, or the first after the run has gone back
            self._last, self._since = step - 1, time.perf_counter()
        if self.config.every == "auto":
            return step - self._last >= self.every
        return self.every > 0 and step % self.every == 0

    def learn(self, save: Save) -> None:
        """Choose the interval anew from what a save has cost."""
        if self.config.every != "auto" or self._last is None:
            return
        steps = max(1, save.state.step - self._last)
        step_seconds = (save.begun - self._since) / steps
        self._last, self._since = save.state.step, save.begun + save.stall
        before, self.every = self.every, best_interval(save.stall, save.seconds, step_seconds, self.config.failures_per_day)
        if before == FIRST or not 0.5 <= self.every / before <= 2:
            self._say(
                f"checkpoint.every = auto: every {self.every:,} steps from now on (a save stalls {save.stall:.3f} s and takes "
                f"{save.seconds:.1f} s, a step {step_seconds:.3f} s, {self.config.failures_per_day:g} failures a day)"
            )


def best_interval(stall: float, seconds: float, step_seconds: float, failures_per_day: float) -> int:
    """Steps between checkpoints that lose the least time: sqrt(2 * stall * time between failures) seconds (Young 1974).

    Args: stall: seconds that training stands still for a save; seconds: what a save takes, before which no other one begins.
    """
    best = math.sqrt(2 * stall * DAY / failures_per_day)
    return max(1, round(max(best, seconds) / max(step_seconds, 1e-9)))


class Copier:
    """Copies checkpoints to a second place, one at a time, on a thread; what cannot be copied is told and no more."""

    def __init__(self, config: CheckpointConfig, run: Path, metrics: Metrics | Silence, say: Callable[[str], None]) -> None:
        self._copies = Copies(config, run)
        self._metrics, self._say = metrics, say
        self._thread = Background()
        self._waiting: Path | None = None
        self._told: list[dict[str, Any]] = []

    def start(self, folder: Path) -> None:
        """Copy a checkpoint, when the former one is done; of several that wait, the newest."""
        self._waiting = folder
        self.poll()

    def poll(self) -> None:
        """Tell of what has been done, and begin what waits."""
        if self._thread.busy:
            return
        for event in self._told:
            self._metrics.write("copy", **event, time=time.time())
            if "error" in event:
                self._say(f"step {event['step']}: {event['error']}")
        self._told.clear()
        folder, self._waiting = self._waiting, None
        if folder is not None:
            self._thread.start(lambda: self._copy(folder), f"copying {folder.name}")

    def finish(self) -> None:
        """Wait until all is copied."""
        while self._thread.busy or self._waiting or self._told:
            self._thread.join()
            self.poll()

    def _copy(self, folder: Path) -> None:
        begun = time.perf_counter()
        event: dict[str, Any] = {"step": int(folder.name.removeprefix("step-"))}
        try:
            self._copies.copy(open_checkpoint(folder))
        except UserError as error:
            event["error"] = str(error)
        self._told.append(event | {"seconds": time.perf_counter() - begun})


def snapshot(pieces: list[Piece]) -> list[Piece]:
    """What this rank saves, copied into host memory unless it lies there and stays as it is."""
    copies = []
    for piece in saved_pieces(pieces):
        copies.append(replace(piece, values=piece.values.detach().to("cpu", copy=not piece.lasting), done=nothing))
        piece.done()
    return copies


def check_places(run: Path, config: CheckpointConfig, pieces: list[Piece], needed: int, machines: Machines) -> None:
    """Refuse what the first save would stumble over, on any rank; rank 0 goes before the others. needed: bytes of a checkpoint."""
    copied = sum(piece.values.nbytes for piece in saved_pieces(pieces) if not (piece.lasting and piece.values.device.type == "cpu"))
    if config.asynchronous and copied > free_memory():
        raise UserError(
            f"checkpoint.asynchronous copies {copied / 2**30:,.1f} GiB of state on each process before it writes them, "
            f"{free_memory() / 2**30:,.1f} GiB are free: write them while training waits, with --no-checkpoint.asynchronous"
        )
    if config.memory_every and not machines.each:
        raise UserError(
            f"checkpoint.memory_every = {config.memory_every}: the run's {machines.ranks} processes are not spread evenly, one machine "
            "after the other: start as many on each, in the order of their ranks, or leave it out"
        )
    if machines.rank == 0:
        check_space(run, needed)
    if config.memory_every and machines.leads:
        make_memory_folder(run, needed, first=machines.rank == 0)


def find_start(run: Path, config: CheckpointConfig, memory: Iterable[Candidate], say: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint on disk, in memory or among the copies; damaged ones are named and passed over.

    Raises `UserError` when none is good, or when a run that has saved has none any more. What a process has left that was killed before it
    removed older ones is removed.
    """
    others = [*memory, *(Copies(config, run).candidates() if config.copy_to else ())]
    found = newest_checkpoint(run, say, others=others)
    if found is not None and found.folder.parent == run / "checkpoints":
        remove_old(run, saved_state(found), config)
    saved = _saved_step(run) if found is None else None
    if saved is not None:
        raise UserError(
            f"{run}: metrics.jsonl says that step {saved} was saved, but {run / 'checkpoints'} holds no checkpoint: put it back, set "
            "checkpoint.copy_to to where a copy lies, or start again in another --run folder"
        )
    return found


def _saved_step(run: Path) -> int | None:
    """The last step that a run's metrics say was saved on disk."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith(b'{"event": "save"') and b'"place": "memory"' not in line:
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
    return None
