"""Groups of a model's parts that learn differently: `optim.groups`, lines such as `*.bias: lr=0.1 decay=0` or `embedding.*: frozen`."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from teratron.config.errors import UserError, nearest

WORDS = ("lr", "decay", "frozen")


@dataclass(frozen=True)
class Group:
    """What a line says of the parts whose names match its pattern; None = nothing."""

    pattern: str
    lr: float | None = None
    """Factor of the learning rate."""
    decay: float | None = None
    """Weight decay."""
    frozen: bool = False

    def matches(self, name: str) -> bool:
        """Whether a part, such as `blocks.0.attention.q.weight`, is one of the group."""
        return fnmatch.fnmatchcase(name, self.pattern)


def parse_group(text: str) -> Group:
    """Raises `UserError` that names the line."""
    pattern, colon, rest = text.partition(":")
    words = rest.split()
    if not colon or not pattern.strip() or not words:
        raise _wrong(text, "a pattern of names, a colon, and what holds for them")
    found: dict[str, float] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in WORDS or name in found:
            raise _wrong(text, f"{', '.join(WORDS)}, each at most once, found {word!r}{nearest(name, WORDS)}")
        found[name] = 1.0 if name == "frozen" and not equals else _number(text, word, name, value)
    if "frozen" in found and len(found) > 1:
        raise _wrong(text, "nothing beside frozen, as what is frozen learns nothing")
    return Group(pattern.strip(), found.get("lr"), found.get("decay"), "frozen" in found)


def _number(text: str, word: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if name == "frozen" or not 0 <= number < math.inf:
        raise _wrong(text, f"lr=NUMBER, decay=NUMBER (at least 0) or frozen, found {word!r}")
    return number


def _wrong(text: str, expected: str) -> UserError:
    return UserError(f"optim.groups: {text!r}: expected {expected}, such as '*.bias: lr=0.1 decay=0' or 'embedding.*: frozen'")
