"""Where the time of traced steps goes: every moment has one kind of work, so that the kinds add up to the step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from teratron.config import UserError
from teratron.parallel.spans import DATA, STARVED, STEP, UPDATE, WAIT
from teratron.plan.meter import ATTENTION, ELEMENTWISE, OPTIMIZER, PRODUCTS

COMMUNICATION, IDLE, HOST = "communication", "idle", "host"
KINDS = {
    PRODUCTS: "matrix products",
    ATTENTION: "attention",
    ELEMENTWISE: "elementwise",
    OPTIMIZER: "optimizer",
    COMMUNICATION: "communication",
    DATA: "data",
    HOST: "Python, launches",
    IDLE: "idle (pipeline)",
}
"""Kinds of work, as they are shown."""
MULTIPLIES = re.compile(
    r"aten::(linear|matmul|mm|addmm|addmm_|_addmm_activation|_scaled_mm|_?grouped_mm)$|mkldnn|gemm|gemv|cutlass|nvjet|cublas", re.I
)
ATTENDS = re.compile(r"attention|flash|fmha|flex_|aten::(bmm|baddbmm)$", re.I)
TALKS = re.compile(r"^c10d::|^gloo:|^nccl|record_param_comms", re.I)
BOOKKEEPING = re.compile(
    r"aten::(view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|expand|expand_as|slice|select|narrow|split|split_with_sizes|chunk|unbind"
    r"|squeeze|unsqueeze|flatten|unflatten|as_strided|alias|detach|detach_|lift_fresh|resolve_conj|resolve_neg|result_type|promote_types"
    r"|empty|empty_like|empty_strided|new_empty|resize_|set_|item|_local_scalar_dense|is_nonzero)$"
)
"""Operations that move nothing: their time is that of calling them."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events of a trace that a GPU executes."""


class Event(NamedTuple):
    """Something of a trace; microseconds."""

    start: float
    end: float
    kind: str


def breakdown(trace: Path) -> dict[str, float]:
    """Milliseconds of a mean traced step by kind; they add up to the step. Raises `UserError` for a file without a step.

    On CPU a moment belongs to the innermost operation that is under way. On a GPU it belongs to what the device computes; where it
    computes nothing, to what it sends; where nothing at all, to what the host does instead of feeding it.
    """
    events = [event for event in json.loads(trace.read_bytes())["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation"]
    if not steps:
        raise UserError(f"{trace}: holds no step: expected a trace that log.profile_step or `teratron bench profile` has written")
    windows = [(float(step["ts"]), float(step["ts"] + step["dur"])) for step in steps]
    host = sorted((event for event in events if event["tid"] == steps[0]["tid"] and event.get("cat") not in ON_DEVICE), key=_outer_first)
    device = [event for event in events if event.get("cat") in ON_DEVICE]
    layers = [*_waits(host), *_on_device(device, events, host)] if device else _on_host(host)
    found = [painted(window, layers) for window in windows]
    return {kind: sum(one[kind] for one in found) / len(found) / 1000 for kind in KINDS}


def painted(window: tuple[float, float], events: Iterable[Event]) -> dict[str, float]:
    """How long each kind is on top within a window, where each event covers those before it, and `HOST` lies below all."""
    inside = [Event(max(event.start, window[0]), min(event.end, window[1]), event.kind) for event in events]
    inside = [event for event in inside if event.start < event.end]
    edges = np.unique([*window, *(event.start for event in inside), *(event.end for event in inside)])
    names = list(KINDS)
    top = np.full(len(edges) - 1, names.index(HOST))
    for event in inside:
        top[np.searchsorted(edges, event.start) : np.searchsorted(edges, event.end)] = names.index(event.kind)
    lengths = np.bincount(top, weights=np.diff(edges), minlength=len(names))
    return dict(zip(names, lengths.tolist(), strict=True))


def _outer_first(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], -event["dur"]


def _event(event: dict[str, Any], kind: str) -> Event:
    return Event(event["ts"], event["ts"] + event["dur"], kind)


def _on_host(events: list[dict[str, Any]]) -> list[Event]:
    """Innermost operations on top; attention, the update, data and messages keep what is within them."""
    operations = [_event(event, operation_kind(event["name"])) for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    whole = [event for event in operations if event.kind == ATTENTION]
    update = [_event(event, OPTIMIZER) for event in events if event["name"] == UPDATE]
    talk = [event for event in operations if event.kind == COMMUNICATION]
    return [*operations, *whole, *update, *talk, *_waits(events)]


def _waits(events: list[dict[str, Any]]) -> list[Event]:
    kinds = {DATA: DATA, WAIT: COMMUNICATION, STARVED: IDLE}
    return [_event(event, kinds[event["name"]]) for event in events if event["name"] in kinds]


def _on_device(device: list[dict[str, Any]], events: list[dict[str, Any]], host: list[dict[str, Any]]) -> Iterator[Event]:
    """Kernels, those that compute above those that send."""
    launched = {event["args"].get("correlation"): event["ts"] for event in events if str(event.get("cat")).startswith("cuda_")}
    updates = [(event["ts"], event["ts"] + event["dur"]) for event in host if event["name"] == UPDATE]
    computing = []
    for event in device:
        kind, moment = kernel_kind(event["name"]), launched.get(event["args"].get("correlation"), -1.0)
        if kind == COMMUNICATION:
            yield _event(event, kind)
        else:
            updating = any(start <= moment < end for start, end in updates)
            computing.append(_event(event, OPTIMIZER if updating else kind))
    yield from computing


def operation_kind(name: str) -> str:
    """The kind of what a CPU does, by the name of an operation."""
    if TALKS.search(name):
        return COMMUNICATION
    if name.startswith("autograd::") or BOOKKEEPING.match(name):
        return HOST
    if ATTENDS.search(name):
        return ATTENTION
    if MULTIPLIES.search(name):
        return PRODUCTS
    return ELEMENTWISE if name.startswith("aten::") or "ompiled" in name else HOST


def kernel_kind(name: str) -> str:
    """The kind of what a GPU does, by the name of a kernel."""
    if TALKS.search(name):
        return COMMUNICATION
    return ATTENTION if ATTENDS.search(name) else PRODUCTS if MULTIPLIES.search(name) else ELEMENTWISE
