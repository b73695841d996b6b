"""A dry run for people, and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from teratron.plan.dryrun import STATE, DryRun, on_device
from teratron.plan.layout_text import degrees_line, model_line

GIB = 2**30
NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer and masters",
    "offloaded": "optimizer and masters, elsewhere",
    "activations": "activations",
    "communication": "communication buffers",
    "batch": "batch",
}
"""Kinds of memory in the order in which they are shown."""


def dry_run_text(found: DryRun, memory: float | None = None) -> str:
    """Does it fit, where memory goes, operations, messages. memory: GiB of a device."""
    config = found.config
    head = [model_line(config.model), degrees_line(found.sizes)]
    head += [f"rank {found.rank:,}, {found.micro_batches:,} micro-batches a step in {config.train.precision}", "", verdict(found, memory)]
    rows = [(NAMES[kind], gib(found.peak[kind]), gib(found.state[kind]) if kind in STATE else "") for kind in NAMES if kind in found.peak]
    rows += [("in all on the device" if "offloaded" in found.peak else "in all", gib(found.total), gib(on_device(found.state)))]
    memory_table = table(("memory in GiB", "at the peak", "between steps"), rows)
    work = f"{found.flops:,} floating-point operations a step ({found.flops / 1e12:,.1f} T)"
    return "\n".join([*head, "", *memory_table, "", work, "", *messages(found)])


def verdict(found: DryRun, memory: float | None) -> str:
    """Whether the step fits into so many GiB, and by how much."""
    peak = found.total / GIB
    if memory is None:
        return f"takes {peak:,.1f} GiB"
    if peak <= memory:
        return f"fits {memory:g} GiB: takes {peak:,.1f} GiB, {memory - peak:,.1f} GiB are left"
    return f"does not fit {memory:g} GiB: takes {peak:,.1f} GiB, {peak - memory:,.1f} GiB too much"


def messages(found: DryRun) -> list[str]:
    """What this rank exchanges with others in a step."""
    if not found.messages:
        return ["no messages"]
    rows = [
        (message.what, message.axes, f"{message.ranks:,}", f"{calls:,}", gib(volume), gib(sent))
        for message, (calls, volume, sent) in sorted(found.messages.items(), key=lambda pair: (pair[0].axes, pair[0].what))
    ]
    return table(("messages of a step", "along", "ranks", "calls", "tensors in GiB", "sent in GiB"), rows)


def gib(size: int) -> str:
    return f"{size / GIB:,.3f}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; words to the left, numbers to the right."""
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    left = [any(char.isalpha() for char in lines[-1][column]) for column in range(len(titles))]
    cells = [[cell.ljust(w) if words else cell.rjust(w) for cell, w, words in zip(line, widths, left, strict=True)] for line in lines]
    return ["  ".join(line).rstrip() for line in cells]


def dry_run_json(found: DryRun) -> str:
    """All numbers, in bytes."""
    return json.dumps(
        {
            "world": found.world,
            "rank": found.rank,
            "layout": found.sizes,
            "micro_batches": found.micro_batches,
            "peak": found.peak,
            "state": found.state,
            "flops": found.flops,
            "messages": [
                {**message._asdict(), "calls": calls, "bytes": volume, "sent": sent}
                for message, (calls, volume, sent) in found.messages.items()
            ],
        },
        indent=1,
    )
