"""Files that are nearly right: edits of bytes and of JSON trees, drawn by hypothesis, and the limits in which a reader must refuse them."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teratron.config import UserError

MEMORY = 1 << 30
"""Bytes of address space that reading a file of some kilobytes may take."""
SECONDS = 20
"""Of processor time, for one file."""
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30, -(2**63)]),
    st.integers(-(2**70), 2**70),
)
ODD = st.one_of(
    NUMBERS,
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(["..", "/", "../../x", "\0", "\ud800", "F32", "float32", "", "a" * 3000]),
    st.sampled_from([[], {}, [[]], [0], [2**62, 2**62], {"": 0}, [None], [[[[[[[[]]]]]]]]]),
)
WHERE = st.floats(0, 1, exclude_max=True)

Edit = tuple[str, float, Any]
BYTE_EDITS = st.one_of(
    st.tuples(st.just("flip"), WHERE, st.integers(0, 7)),
    st.tuples(st.just("cut"), WHERE, st.none()),
    st.tuples(st.just("number"), WHERE, NUMBERS),
    st.tuples(st.just("insert"), WHERE, st.binary(max_size=16)),
    st.tuples(st.just("remove"), WHERE, st.integers(1, 64)),
    st.tuples(st.just("repeat"), WHERE, st.integers(1, 64)),
)
TREE_EDITS = st.tuples(st.sampled_from(["replace", "delete", "rename", "copy"]), WHERE, ODD)
BYTES, TREES = st.lists(BYTE_EDITS, min_size=1, max_size=4), st.lists(TREE_EDITS, min_size=1, max_size=3)


def edit_bytes(content: bytes, edits: list[Edit]) -> bytes:
    """A file with bits flipped, stretches removed, repeated or put in, and eight bytes overwritten by a number."""
    found = bytearray(content)
    for kind, where, what in edits:
        at = int(where * len(found))
        match kind:
            case "flip" if found:
                found[at] ^= 1 << what
            case "cut":
                del found[at:]
            case "number":
                found[at : at + 8] = (what % 2**64).to_bytes(8, "little")
            case "insert":
                found[at:at] = what
            case "remove":
                del found[at : at + what]
            case "repeat":
                found[at:at] = found[at : at + what]
    return bytes(found)


def edit_tree(tree: Any, edits: list[Edit]) -> Any:
    """A JSON value in which places have been replaced, removed, renamed or overwritten by another one."""
    root = [copy.deepcopy(tree)]
    for kind, where, what in edits:
        places = list(_places(root))
        holder, key = places[int(where * len(places))]
        other_holder, other_key = places[int(where * 7919) % len(places)]
        match kind:
            case "replace":
                holder[key] = copy.deepcopy(what)
            case "copy":
                holder[key] = copy.deepcopy(other_holder[other_key])
            case "delete" if holder is not root:
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[str(what)] = holder.pop(key)
    return root[0]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value, as (object or array, key or index)."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def hunt(inputs: st.SearchStrategy[Any], read: Callable[[Any], object], count: int, least: float = 0.05) -> None:
    """Give so many inputs to a reader, which may take them or raise `UserError`, within `MEMORY` and `SECONDS`; always the same ones.

    least: the share that must have been refused.
    """
    refused = [0]

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def once(value: Any) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            read(value)
        except UserError:
            refused[0] += 1
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    with _limits():
        once()
    assert refused[0] >= least * count, "hardly anything was refused: the edits reach nothing"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """A file that makes its reader ask for much memory, or never end, fails here and not the machine."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"a reader took over {SECONDS} s of processor time")

    former, old = signal.signal(signal.SIGVTALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGVTALRM, former)
