"""The one exception that a user sees: a sentence that names the thing, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix. The command line prints it on one line and exits with code 2.

    Write it as: which key or file, the value found, what was expected, what to type instead.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of the known names, or an empty string.

    The last dotted component is also compared alone, so that `model.layer` and `train.layers` both find `model.layers`.
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if not close:
        by_leaf = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.6)
        close = [by_leaf[leaf[0]]] if leaf else difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
