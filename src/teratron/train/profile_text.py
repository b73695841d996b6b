"""A step's profile and its speed, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from teratron.plan.dryrun_text import table
from teratron.train.bounds import Profile, advice
from teratron.train.breakdown import KINDS
from teratron.train.trial import Speed


def speed_text(speed: Speed, ranks: int) -> str:
    """A line."""
    everywhere = f" on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"{speed.tokens_per_second:,.0f} tokens/s, {speed.seconds * 1e3:,.1f} ms a step of {speed.tokens:,} tokens; "
        f"MFU {speed.mfu:.1%} of {speed.peak_flops / 1e9:,.0f} GFLOP/s{everywhere}; peak memory {speed.memory / 2**20:,.0f} MiB"
    )


def speed_json(speed: Speed) -> dict[str, Any]:
    """The same as numbers: seconds, bytes."""
    return {"tokens_per_second": speed.tokens_per_second, **asdict(speed)}


def profile_text(found: Profile) -> str:
    """A line for each kind of work: time, share, and how near it comes to its bound."""
    step = sum(found.kinds.values())
    rows = [_row(kind, found, step) for kind in KINDS if found.kinds[kind] or kind in found.least]
    whole = ["whole step", f"{step:,.2f}", "100.0%", "", "", ""]
    titles = ["kind of work", "ms", "share", "bound, ms", "bound/time", "all ranks, ms"]
    lines = [line.rstrip() for line in table(titles, [*rows, whole])]
    several = f"rank {found.rank}, which the others wait for; " if len(found.ranks) > 1 else ""
    link = f", {found.speeds.link / 1e9:,.2f} GB/s between ranks" if found.speeds.link else ""
    notes = [
        f"{several}tracing makes a step {max(0.0, found.traced / found.speed.seconds - 1):.0%} longer",
        f"bounds: operations at {found.speeds.flops / 1e9:,.0f} GFLOP/s, bytes of each operation by itself at "
        f"{found.speeds.memory / 1e9:,.1f} GB/s{link}; caches and fused operations may beat the bytes",
    ]
    hints = [f"try: {KINDS[kind]}: {line}" for kind, line in advice(found.config, found.kinds, found.least, found.cuda)]
    return "\n".join([speed_text(found.speed, len(found.ranks)), "", *lines, "", *notes, "", *hints])


def _row(kind: str, found: Profile, step: float) -> list[str]:
    spent, least = found.kinds[kind], found.least.get(kind)
    everywhere = [rank[kind] for rank in found.ranks]
    spread = f"{min(everywhere):,.2f} to {max(everywhere):,.2f}" if len(everywhere) > 1 else ""
    bound = ["", ""] if least is None else [f"{least:,.2f}", f"{least / spent:.0%}" if spent else ""]
    return [KINDS[kind], f"{spent:,.2f}", f"{spent / step:.1%}", *bound, spread]


def profile_json(found: Profile) -> dict[str, Any]:
    """The same as numbers: milliseconds and bytes."""
    rows = {"ranks": [dict(rank) for rank in found.ranks], "rank": found.rank, "bound": dict(found.least), "speeds": asdict(found.speeds)}
    return {**speed_json(found.speed), **rows, "advice": dict(advice(found.config, found.kinds, found.least, found.cuda))}
