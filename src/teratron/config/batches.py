"""How many sequences each optimizer step takes, and so how many were taken before it: a pure function of the config."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from teratron.config.errors import UserError


@dataclass(frozen=True)
class Stage:
    """Steps in a row that take the same number of sequences."""

    start: int
    """Steps before it."""
    before: int
    """Sequences that those steps have taken."""
    size: int
    """Sequences of each of its own steps."""


class Batches:
    """The global batches of a run: step s (from 1) takes the sequences that follow those of the steps before it."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        """pairs: (steps before, sequences of a step) of each stage, ascending, the first with no steps before."""
        stages: list[Stage] = []
        for start, size in pairs:
            last = stages[-1] if stages else Stage(0, 0, 0)
            stages.append(Stage(start, last.before + (start - last.start) * last.size, size))
        self.stages = tuple(stages)

    def size(self, step: int) -> int:
        """Sequences of a step, from 1."""
        return self._stage(step - 1).size

    def until(self, step: int) -> int:
        """Sequences of the first so many steps together."""
        stage = self._stage(step)
        return stage.before + (step - stage.start) * stage.size

    def steps(self, sequences: float) -> float:
        """The inverse of `until`: after how many steps, a part of one counted as such, so many sequences have been taken."""
        stage = self.stages[bisect.bisect_right(self.stages, sequences, key=lambda stage: stage.before) - 1]
        return stage.start + (sequences - stage.before) / stage.size

    def unreached(self, steps: int) -> str:
        """In words, the size to which a run of so many steps never comes; empty = it comes to all."""
        last = self.stages[-1]
        return f"the batch never grows to {last.size:,} sequences, which begin after step {last.start:,}" if last.start >= steps else ""

    @property
    def sizes(self) -> list[int]:
        """All sizes, ascending."""
        return sorted({stage.size for stage in self.stages})

    def _stage(self, steps: int) -> Stage:
        """The stage of the step after so many."""
        return self.stages[bisect.bisect_right(self.stages, steps, key=lambda stage: stage.start) - 1]


def plan_batches(global_batch: int, tokens: int, schedule: str, seq_length: int) -> Batches:
    """Read `train.global_batch`, `train.batch_tokens` and `train.batch_schedule`.

    The schedule is empty, or Megatron-LM's `START INCREMENT LENGTH`, or `STEP:SIZE, STEP:SIZE, ...`; with tokens > 0 sizes and LENGTH
    are in tokens, else in sequences. Raises `UserError` that names the key.
    """
    unit = seq_length if tokens else 1
    if tokens:
        global_batch = _sequences(tokens, unit, "train.batch_tokens")
    if not schedule.strip():
        return Batches([(0, global_batch)])
    steps = ":" in schedule
    numbers = _numbers(schedule, ":" if steps else None)
    found = _steps(numbers, unit, schedule) if steps else _ramp(numbers, global_batch, unit, schedule)
    if found[-1][1] != global_batch:
        name, last = ("batch_tokens", found[-1][1] * unit) if tokens else ("global_batch", found[-1][1])
        whole = tokens or global_batch
        raise UserError(
            f"train.batch_schedule = {schedule!r} ends at {last}, but train.{name} = {whole}: end it at {whole}, or add "
            f"--train.{name} {last}"
        )
    return Batches(found)


def _numbers(schedule: str, colon: str | None) -> list[list[int]]:
    """A list for every `STEP:SIZE`, or the one of a ramp."""
    try:
        return [[int(word) for word in item.split(colon)] for item in (schedule.split(",") if colon else [schedule])]
    except ValueError:
        raise _wrong(schedule) from None


def _steps(pairs: list[list[int]], unit: int, schedule: str) -> list[tuple[int, int]]:
    starts = [pair[0] for pair in pairs]
    ascending = starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts))
    if not ascending or any(len(pair) != 2 or pair[1] < 1 for pair in pairs):
        raise _wrong(schedule)
    return [(start, _sequences(size, unit, f"train.batch_schedule = {schedule!r}: size")) for start, size in pairs]


def _ramp(numbers: list[list[int]], global_batch: int, unit: int, schedule: str) -> list[tuple[int, int]]:
    """Megatron-LM's rule: after c sequences START + INCREMENT * floor(c / LENGTH * increments), that at the beginning of a step."""
    if len(numbers[0]) != 3 or min(numbers[0]) < 1:
        raise _wrong(schedule)
    named = zip(("START", "INCREMENT", "LENGTH"), numbers[0], strict=True)
    start, increment, length = (_sequences(number, unit, f"train.batch_schedule = {schedule!r}: {name}") for name, number in named)
    if start >= global_batch or (global_batch - start) % increment:
        raise UserError(
            f"train.batch_schedule = {schedule!r} does not reach the global batch of {global_batch * unit} from {start * unit} in steps of "
            f"{increment * unit}: choose a smaller START, and an INCREMENT that divides their difference"
        )
    count, steps, seen = (global_batch - start) // increment, 0, 0
    found: list[tuple[int, int]] = []
    while not found or found[-1][1] < global_batch:
        level = min(seen * count // length, count)
        size = start + level * increment
        found.append((steps, size))
        border = -(-(level + 1) * length // count)  # the first count of sequences that is a level higher
        more = -(-(border - seen) // size)
        steps, seen = steps + more, seen + more * size
    return found


def _sequences(tokens: int, unit: int, name: str) -> int:
    """Tokens, or with a unit of 1 sequences, as sequences."""
    if tokens % unit or tokens < 1:
        below = tokens // unit * unit
        near = f"{below} or {below + unit}" if below > 0 else str(unit)
        raise UserError(f"{name} = {tokens} is not a multiple of model.seq_length = {unit}: choose {near}")
    return tokens // unit


def _wrong(schedule: str) -> UserError:
    return UserError(
        f"train.batch_schedule = {schedule!r}: expected START INCREMENT LENGTH as Megatron-LM's --rampup-batch-size, such as '32 32 "
        "100000', or STEP:SIZE with ascending steps from 0, such as '0:64, 1000:128'"
    )
