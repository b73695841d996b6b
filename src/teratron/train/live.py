"""Live changes: RUN/live.toml changes a run that is under way, between two steps, in a way that every resumed run repeats (law 3).

A change is a (first step, key, value) in the training state. It is written into metrics.jsonl before its first step is made, so that a
run that goes on from an older checkpoint takes it up again at the same step.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from teratron.checkpoint.agree import agree, gather_json
from teratron.config import OptimConfig, UserError, nearest
from teratron.config.keys import coerce
from teratron.parallel.mesh import Mesh

NAME = "live.toml"
PERIOD = 1.0
"""Seconds between two looks at the file."""
KEYS = {"lr": "lr", "lr_factor": "lr", "weight_decay": "weight_decay", "clip": "clip"}
"""What may be changed, and the key of `optim.*` that it takes the place of."""
STOP = "stop_step"
NEVER = 2**62

Change = tuple[int, str, float]
Changes = tuple[Change, ...]
"""By first step: (first step, key, value)."""


def in_force(changes: Changes, step: int) -> dict[str, float]:
    """The values that hold at a step; of `lr` and `lr_factor` the later one."""
    found: dict[str, float] = {}
    for first, key, value in changes:
        if first <= step:
            found = {other: held for other, held in found.items() if KEYS[other] != KEYS[key]} | {key: value}
    return found


def live_optim(config: OptimConfig, changes: Changes, step: int) -> OptimConfig:
    """The optimizer's config in a step for which the run's says another."""
    held = in_force(changes, step)
    return replace(config, weight_decay=held.get("weight_decay", config.weight_decay), clip=held.get("clip", config.clip))


def live_lr(scheduled: float, changes: Changes, step: int) -> float:
    """The learning rate of a step for which the schedule says another."""
    held = in_force(changes, step)
    return held.get("lr", scheduled * held.get("lr_factor", 1.0))


def changed(changes: Changes, more: Iterable[Change]) -> Changes:
    """With further changes, each in place of all those of the same thing from its first step on."""
    for first, key, value in more:
        kept = (other for other in changes if other[0] < first or KEYS[other[1]] != KEYS[key])
        changes = tuple(sorted([*kept, (first, key, value)]))
    return changes


def not_overridden(changes: Changes, old: OptimConfig, new: OptimConfig) -> Changes:
    """Without those of keys that a branch has been given anew."""
    return tuple(change for change in changes if getattr(old, KEYS[change[1]]) == getattr(new, KEYS[change[1]]))


def recorded(run: Path) -> list[Change]:
    """The changes in a run's metrics.jsonl, in the order in which they were made."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        if not line.startswith(b'{"event": "live"') or not line.endswith(b"}"):  # one cut short was never followed by a step
            continue
        try:
            event = json.loads(line)
            found += [(int(event["step"]), key, float(event[key])) for key in KEYS if key in event]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{run}/metrics.jsonl: line {number}, a live change, cannot be read: restore it from a copy") from None
    return found


def read_live(path: Path) -> dict[str, float]:
    """The file's keys and values; nothing where there is none. Raises `UserError` for what it cannot be."""
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}") from None
    for key, value in found.items():
        if key not in (*KEYS, STOP):
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, [*KEYS, STOP])}; keys: {', '.join([*KEYS, STOP])}")
        found[key] = coerce(value, int if key == STOP else float, f"{path}: {key}")
        if found[key] < 0:
            raise UserError(f"{path}: {key} = {value}: expected at least 0")
    if {"lr", "lr_factor"} <= found.keys():
        raise UserError(f"{path}: lr = {found['lr']} and lr_factor = {found['lr_factor']} are two learning rates: keep one")
    return found


class Live:
    """Looks at a run's file for all ranks: `asked` on rank 0, `look` by all of them together."""

    def __init__(self, run: Path, mesh: Mesh, say: Callable[[str], None]) -> None:
        self.path, self._mesh, self._say = run / NAME, mesh, say
        self.wanted: dict[str, float] = {}
        """What the file says, the same on every rank; of a file that is wrong what it said before."""
        self._stop = 0.0
        self._seen: tuple[int, ...] = ()
        self._looked = 0.0

    def asked(self) -> bool:
        """Whether this is rank 0 and the file has changed; reads nothing, and at most once a period."""
        if self._mesh.rank or time.monotonic() - self._looked < PERIOD:
            return False
        self._looked = time.monotonic()
        return self._signature() != self._seen

    def look(self) -> None:
        """Read the file; a collective. A wrong file is told of and changes nothing."""
        if self._mesh.rank == 0:
            self._seen = self._signature()
            try:
                self.wanted = read_live(self.path)
            except UserError as error:
                self._say(f"{error}; ignored until the file changes")
        self.wanted = gather_json(self._mesh.control, self.wanted)[0]

    def replayed(self, changes: Changes) -> Changes:
        """Those that a checkpoint knows, and those that this run has been through since; a collective."""
        found = agree(self._mesh.control, lambda: [] if self._mesh.rank else recorded(self.path.parent))
        return changed(changes, (tuple(change) for change in found[0]))

    def take(self, changes: Changes, step: int) -> tuple[Changes, dict[str, float]]:
        """The changes with what the file says anew, from a step on; and that alone, as an event has it.

        What a change has said already is not new, also where it lies ahead of a run that goes on.
        """
        held = in_force(((0, "lr_factor", 1.0), *changes), NEVER)
        news = {key: value for key, value in self.wanted.items() if key in KEYS and held.get(key) != value}
        changes = changed(changes, ((step, key, value) for key, value in news.items()))
        stop, self._stop = self._stop, self.wanted.get(STOP, 0)
        return changes, news | ({STOP: self._stop} if self._stop != stop else {})

    def last_step(self, steps: int) -> int:
        """The step after which the run ends."""
        return min(steps, int(self.wanted.get(STOP, 0)) or steps)

    def tell(self, changes: Changes, step: int) -> None:
        """Say what holds from a step on, and what of it the file does not say."""
        held = in_force(changes, NEVER)
        if held:
            words = ", ".join(f"{key} = {value:g} from step {first}" for first, key, value in changes if held.get(key) == value)
            self._say(f"{NAME}: in force at step {step}: {words}")
        silent = [key for key in held if key not in self.wanted]
        if silent:
            self._say(f"{self.path} no longer says {', '.join(silent)}: the last value goes on to hold; write the former one to undo it")

    def _signature(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino
