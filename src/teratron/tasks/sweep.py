"""A sweep: trials of a config, each an ordinary run trained by a process of its own, kept in one folder and gone on with after any stop."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teratron.checkpoint.format import write_synced
from teratron.config import Config, UserError
from teratron.data.open import open_data
from teratron.objectives import build_objective
from teratron.tasks.sweep_jobs import Job, Outcome, Slot, arguments_of, set_stop
from teratron.tasks.sweep_page import write_page
from teratron.tasks.sweep_space import Point, check_points, describe, grid_points, parse_dimension, random_points, rungs
from teratron.train.commands import program
from teratron.train.interrupt import Interrupt
from teratron.train.run import absolute_paths, lock, refuse_changes

PERIOD = 0.2
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Plan:
    """What a sweep tries; nothing of it may change when the sweep goes on."""

    base: Config
    over: tuple[str, ...]
    """As `--over` takes them."""
    method: str
    """`grid`, `random`, or `halving`."""
    trials: int
    """How many, spread at random; 0 = all points of the grid."""
    metric: str = "valid_loss"
    eta: int = 3
    """Of each round of halving the best 1/eta goes on, eta times as far."""
    seed: int = 1234

    def points(self) -> list[Point]:
        """The trials. Raises `UserError` for what is no valid config, before anything is trained."""
        dimensions = [parse_dimension(text) for text in self.over]
        keys = [dimension.key for dimension in dimensions]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise UserError(f"--over {twice}: is given twice: name all its values in one")
        if self.method == "halving" and "train.steps" in keys:
            raise UserError("--over train.steps: halving compares trials at the same step of the same schedule: use --method grid")
        points = random_points(dimensions, self.trials, self.seed) if self.trials else grid_points(dimensions)
        check_points(self.base, points)
        return points

    def rounds(self, count: int) -> list[tuple[int, int]]:
        """(trials, up to which step; 0 = each its own `train.steps`) of each round."""
        return rungs(count, self.base.train.steps, self.eta) if self.method == "halving" else [(count, 0)]

    def settings(self) -> dict[str, Any]:
        """Everything but the base config, by option."""
        return {name: value for name, value in asdict(self).items() if name != "base"} | {"over": list(self.over)}


class Sweep:
    """A sweep in its folder. Making it checks everything, and that the folder holds this very sweep or none."""

    def __init__(self, plan: Plan, folder: Path, slots: Sequence[Slot], nproc: int = 1, device: str = "auto") -> None:
        """Raises `UserError` for a wrong value anywhere in the sweep, or a folder of something else."""
        self.plan, self.folder, self.slots, self.nproc, self.device = plan, folder, slots, nproc, device
        self.points = plan.points()
        self.rounds = plan.rounds(len(self.points))
        self._lock = lock(folder)
        base = absolute_paths(plan.base)
        self._continue(base)
        self.outcomes = read_outcomes(folder / "sweep.jsonl")
        self.base, self.jobs = base, list[Job]()

    def _continue(self, base: Config) -> None:
        """Hold against what the folder says, or write that."""
        path, now = self.folder / "sweep.json", self.plan.settings() | {"trials_made": self.points}
        if not path.is_file():
            if (self.folder / "config.toml").is_file():
                raise UserError(f"--run {self.folder}: holds a run: choose another folder for the sweep")
            write_synced(self.folder / "base.toml", base.to_toml().encode())
            write_synced(path, (json.dumps(now, indent=1) + "\n").encode())
            return
        try:
            then = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise UserError(f"{path}: cannot be read: restore it from a copy, or choose another --run folder") from None
        keys = dict(Config.load(self.folder / "base.toml").items())
        changes = [(f"--{name}", then.get(name), value) for name, value in now.items() if then.get(name) != value]
        changes += [(name, keys[name], value) for name, value in base.items() if keys[name] != value]
        refuse_changes(self.folder, "sweep", changes)

    def run(self, say: Callable[[str], None], show: Callable[[], None]) -> int:
        """Train all trials; returns 0, or the exit code of a signal. show: draws the state of things, often called."""
        shared = self._share_data(say)
        alive = list(range(len(self.points)))
        with Interrupt() as interrupt:
            for count, until in self.rounds:
                alive = alive[:count]
                waiting = [trial for trial in alive if not self._is_over(trial, self._goal(trial, until))]
                self._round(waiting, until, shared, interrupt, say, show)
                alive = self._by_value(alive, until)
                if interrupt.asked:
                    say(f"stopped; to go on: {program()} with the same arguments")
                    return interrupt.asked
        return 0

    def _round(
        self, waiting: list[int], until: int, shared: Point, interrupt: Interrupt, say: Callable[[str], None], show: Callable[[], None]
    ) -> None:
        free = list(self.slots)
        try:
            while self.jobs or (waiting and not interrupt.asked):
                while free and waiting and not interrupt.asked:
                    self._start(waiting.pop(0), until, shared, free.pop(0))
                for job in self.jobs if interrupt.asked else []:
                    job.stop()
                time.sleep(PERIOD)
                for job in [job for job in self.jobs if job.poll() is not None]:
                    self.jobs.remove(job)
                    free.append(job.slot)
                    if not interrupt.asked:
                        self._note(job.outcome(job.process.returncode, self.plan.metric), say)
                show()
        finally:
            for job in self.jobs:
                job.kill()
            self.jobs.clear()

    def _by_value(self, trials: Sequence[int], until: int) -> list[int]:
        """Those that came through a round, the best first."""
        found = [self.outcomes.get((trial, self._goal(trial, until))) for trial in trials]
        return [one.trial for one in sorted((one for one in found if one and one.state == "done"), key=lambda one: (one.value, one.trial))]

    def _goal(self, trial: int, until: int) -> int:
        return until or self.base.override(self.points[trial]).train.steps

    def _start(self, trial: int, until: int, shared: Point, slot: Slot) -> None:
        run, goal = self.run_of(trial), self._goal(trial, until)
        set_stop(run, goal, self.base.override(self.points[trial]).train.steps)
        arguments = arguments_of(run, self.folder.resolve() / "base.toml", shared | self.points[trial], self.nproc, self.device)
        self.jobs.append(Job(trial, run, goal, arguments, slot))

    def _note(self, outcome: Outcome, say: Callable[[str], None]) -> None:
        record = asdict(outcome) | {"value": outcome.value if math.isfinite(outcome.value) else None}
        with (self.folder / "sweep.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.outcomes[outcome.trial, outcome.step] = outcome
        found = f"{self.plan.metric} {outcome.value:.4f}" if outcome.state == "done" else f"{outcome.state}: {outcome.reason}"
        say(f"trial {outcome.trial} ({describe(self.points[outcome.trial])}): step {outcome.step}, {found}")
        write_page(self)

    def _is_over(self, trial: int, step: int) -> bool:
        """Whether a trial has been through a round, for good or ill."""
        found = self.outcomes.get((trial, step))
        return found is not None and found.state != "failed"

    def _share_data(self, say: Callable[[str], None]) -> Point:
        """Prepare raw text once for all trials; returns the keys by which they find it."""
        data = self.base.data
        if (data.train and not data.text) or any(key.startswith(("data.", "objective.", "model.vocab_size")) for key in self.points[0]):
            return {}
        place, needs = self.folder.resolve(), build_objective(self.base).needs
        open_data(self.base, place, (self.base.train.steps,), say, needs)
        return {"data.text": "", "data.train": str(place / "data" / "text"), "data.tokenizer": str(place / "tokenizer")}

    def run_of(self, trial: int) -> Path:
        """A trial's run directory."""
        return self.folder.resolve() / f"trial-{trial:03d}"

    def last(self, trial: int) -> Outcome | None:
        """What a trial has come to so far."""
        return max((found for (other, _), found in self.outcomes.items() if other == trial), key=lambda found: found.step, default=None)

    def best_first(self, trials: Sequence[int]) -> list[int]:
        """Those that came furthest first, of these the best; failed ones last."""

        def rank(trial: int) -> tuple[bool, int, float, int]:
            found = self.last(trial)
            if found is None or found.state != "done":
                return found is not None, 0, math.inf, trial
            return False, -found.step if self.plan.method == "halving" else -1, found.value, trial

        return sorted(trials, key=rank)

    def best(self) -> int | None:
        """The best trial of those that came furthest; None while there is none."""
        first = self.best_first(range(len(self.points)))[0]
        found = self.last(first)
        return first if found is not None and found.state == "done" else None

    def write_best(self) -> str:
        """Write best.toml and return what to type; raises `UserError` when no trial came through."""
        best = self.best()
        if best is None:
            reason = next((found.reason for found in self.outcomes.values()), "no trial has ended")
            raise UserError(f"{self.folder}: no trial came to its end: {reason}")
        path = self.folder / "best.toml"
        write_synced(path, self.base.override(self.points[best]).to_toml().encode())
        again = f"{program()} train {shlex.quote(str(path))} --run {shlex.quote(str(self.folder / 'best'))}"
        return f"best: trial {best} ({describe(self.points[best])}), trained in {self.run_of(best)}; its config alone: {again}"

    def close(self) -> None:
        self._lock.close()


def read_outcomes(path: Path) -> dict[tuple[int, int], Outcome]:
    """By (trial, step); of several the last. A line cut short is left out: its trial is measured again."""
    found: dict[tuple[int, int], Outcome] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            known = json.loads(line)
            outcome = Outcome(**known | {"value": math.nan if known["value"] is None else known["value"]})
        except (ValueError, TypeError, KeyError):
            continue
        found[outcome.trial, outcome.step] = outcome
    return found
