"""The one exception that a user sees: a sentence that names the thing, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix. The command line prints it on one line and exits with code 2.

    Write it as: which key or file, the value found, what was expected, what to type instead.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of the known names, the first of equally close ones, or an empty string.

    The last dotted component is also compared alone, so that `model.layer` and `train.layers` both find `model.layers`.
    """
    names = list(known)
    close = _closest(name, names, 0.7)
    if close is None:
        by_leaf = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
        leaf = _closest(name.rsplit(".", 1)[-1], [*reversed(by_leaf)], 0.6)
        close = by_leaf[leaf] if leaf else _closest(name, names, 0.5)
    return f" (did you mean '{close}'?)" if close else ""


def _closest(name: str, known: list[str], least: float) -> str | None:
    """The known name that is most alike, of several the first; None = none is as alike as `least`, from 0 to 1."""
    likeness = [difflib.SequenceMatcher(None, one, name).ratio() for one in known]
    return known[likeness.index(max(likeness))] if max(likeness, default=0.0) >= least else None
