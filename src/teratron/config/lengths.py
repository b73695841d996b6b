"""How long a part of a schedule is, in steps, tokens or as a share of the run, and the clock that schedules go by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from teratron.config.batches import Batches
from teratron.config.errors import UserError

UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Length:
    """So many steps, or tokens, or a share of the whole."""

    amount: float
    unit: Literal["steps", "tokens", "share"]


def parse_length(value: int | str, name: str) -> Length:
    """Read steps, `5%`, or `300M tokens`; raises `UserError` that names the key."""
    if isinstance(value, int):
        return Length(value, "steps")
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(?:(%)|([kMBT]?)\s*tokens)\s*", value)
    if found is None or (found[2] and float(found[1]) > 100):
        raise UserError(f"{name} = {value!r}: expected steps, a share of the run, or tokens, such as 2000, '5%' or '300M tokens'")
    return Length(float(found[1]) / 100, "share") if found[2] else Length(float(found[1]) * UNITS[found[3]], "tokens")


@dataclass(frozen=True)
class Clock:
    """What a run's schedules go by: steps, or tokens, which are not the same where batches grow."""

    unit: Literal["steps", "tokens"]
    steps: int
    """Of the whole run."""
    seq_length: int
    batches: Batches

    def tokens(self, step: int) -> int:
        """Tokens of the first so many steps."""
        return self.batches.until(step) * self.seq_length

    def now(self, step: int) -> float:
        """The time at the end of a step."""
        return step if self.unit == "steps" else self.tokens(step)

    def after(self, length: Length) -> float:
        """The time when so much of the run is over."""
        if length.unit == "share":
            return length.amount * self.now(self.steps)
        if length.unit == self.unit:
            return length.amount
        return self.tokens(int(length.amount)) if length.unit == "steps" else self.batches.steps(length.amount / self.seq_length)

    def before_end(self, length: Length) -> float:
        """The time when so much of the run is left."""
        whole = {"steps": self.steps, "tokens": self.tokens(self.steps), "share": 1.0}[length.unit]
        return self.after(Length(whole - length.amount, length.unit)) if length.amount < whole else 0.0
