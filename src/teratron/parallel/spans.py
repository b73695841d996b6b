"""Names for what a profiler would not see of a step: it knows operations, and not what they are for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]  # declared in C++
from torch.autograd.profiler import record_function

STEP, DATA, UPDATE, WAIT, STARVED = "teratron: step", "teratron: data", "teratron: update", "teratron: wait", "teratron: wait for a stage"
"""A whole step; making its batch; the optimizer's update; waiting for other ranks; for what another pipeline stage sends."""


def span(name: str) -> AbstractContextManager[Any]:
    """What is done within has this name in a trace; costs nothing where none is made."""
    return record_function(name) if _profiler_enabled() else nullcontext()
