"""What a sweep tries: keys with lists or ranges of values, and the points of a grid or spread at random over them."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from teratron.config import Config, UserError, key_names, nearest
from teratron.config.config import key_kinds

Point = dict[str, str]
"""`section.key` -> value, as on a command line."""
FORMS = "KEY=A,B,C or KEY=LOW..HIGH, with :log and with :N for N points of a grid, such as optim.lr=1e-4..1e-2:log:5"
RANGE = re.compile(r"([^,:]+?)\.\.([^,:]+)(:log)?(?::(\d+))?")


@dataclass(frozen=True)
class Dimension:
    """One key and its values: a list, or a range."""

    key: str
    values: tuple[str, ...] = ()
    """Of a list, in the order given; empty = a range."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    count: int = 0
    """Points of a range in a grid; 0 = none were asked for."""
    whole: bool = False

    def at(self, share: float) -> str:
        """The value at a share, from 0 to 1, of the way."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return str(round(value)) if self.whole else f"{value:.4g}"

    def grid(self) -> list[str]:
        """All values of a list, evenly spaced ones of a range, its ends among them."""
        if not self.values and self.count < 2:
            raise UserError(f"--over {self.key}={self.low:g}..{self.high:g}: a grid needs to know how many points: add :N, at least :2")
        return list(self.values) or list(dict.fromkeys(self.at(i / (self.count - 1)) for i in range(self.count)))


def parse_dimension(text: str) -> Dimension:
    """One `--over`. Raises `UserError` for an unknown key, an empty list, or a range that is none."""
    key, equals, spec = text.partition("=")
    key = key.removeprefix("--").replace("-", "_")
    if key not in key_names():
        raise UserError(f"--over {text}: unknown key '{key}'{nearest(key, key_names())}; expected {FORMS}")
    values = tuple(value.strip() for value in spec.split(","))
    if not equals or "" in values:
        raise UserError(f"--over {text}: expected {FORMS}")
    if len(set(values)) < len(values):
        raise UserError(f"--over {text}: a value stands there twice: keep one")
    if ".." not in spec:
        return Dimension(key, values)
    return _parse_range(text, key, spec)


def _parse_range(text: str, key: str, spec: str) -> Dimension:
    found = RANGE.fullmatch(spec)
    try:
        if found is None:
            raise ValueError
        low, high = float(found[1]), float(found[2])
    except ValueError:
        raise UserError(f"--over {text}: expected a range of numbers as {FORMS}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--over {text}: expected LOW..HIGH, the lower number first")
    if found[3] and low <= 0:
        raise UserError(f"--over {text}: a logarithmic range lies above 0: raise {found[1]}, or leave :log out")
    whole = key_kinds()[key] is not float and low == int(low) and high == int(high)
    return Dimension(key, (), low, high, bool(found[3]), int(found[4] or 0), whole)


def grid_points(dimensions: Sequence[Dimension]) -> list[Point]:
    """Every combination, the last key changing fastest."""
    keys = [dimension.key for dimension in dimensions]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(dimension.grid() for dimension in dimensions))]


def random_points(dimensions: Sequence[Dimension], count: int, seed: int) -> list[Point]:
    """So many points; of each key alone every one of `count` equal shares of its values is met once (a Latin hypercube).

    Fewer where lists do not have so many combinations: no point comes twice.
    """
    draw = random.Random(seed)
    columns = []
    for dimension in dimensions:
        shares = [(place + draw.random()) / count for place in range(count)]
        draw.shuffle(shares)
        columns.append([dimension.at(share) for share in shares])
    keys = [dimension.key for dimension in dimensions]
    points = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
    return list({tuple(point.items()): point for point in points}.values())


def check_points(base: Config, points: Sequence[Point]) -> None:
    """Raise `UserError` for the first point that is no valid config."""
    for number, point in enumerate(points):
        try:
            base.override(point)
        except UserError as error:
            raise UserError(f"trial {number} of {len(points)} ({describe(point)}): {error}") from None


def describe(point: Point) -> str:
    """In words, such as: optim.lr = 0.001, optim.name = lion."""
    return ", ".join(f"{key} = {value}" for key, value in point.items())


def rungs(trials: int, steps: int, eta: int) -> list[tuple[int, int]]:
    """Successive halving (Jamieson and Talwalkar 2016): (trials, up to which step) of each round, the last one to the end.

    Of each round the best 1/eta goes on, eta times as far. Raises `UserError` where the first round has no step.
    """
    counts = [trials]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // eta))
    last = len(counts) - 1
    if steps < eta**last:
        raise UserError(
            f"train.steps = {steps} are too few for {trials} trials in {last + 1} rounds, each {eta} times as long as the one before: "
            f"expected at least {eta**last}; choose fewer --trials, or a larger --eta"
        )
    return [(count, math.ceil(steps / eta ** (last - place))) for place, count in enumerate(counts)]
