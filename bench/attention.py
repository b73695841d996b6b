"""`python bench/attention.py`: what attention costs as the sequence grows, full, over windows and block-sparse; a table and a picture."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from machine import facts
from rich.console import Console
from rich.table import Table

from teratron.models.attention import AttentionCore
from teratron.models.patterns import FULL, Pattern
from teratron.models.sight import Sight

HEADS, FEATURES = 2, 64
PATTERNS = {
    "full": FULL,
    "window 256 by a mask": Pattern(256),
    "window 256": Pattern(256),
    "window 256, 4 sinks": Pattern(256, global_tokens=4),
    "dilated, 128 of 512": Pattern(512, dilation=4),
    "strided 256": Pattern(256, "strided"),
    "fixed 256, 8 of each block": Pattern(256, "fixed", summary=8),
}
MASKED = "window 256 by a mask"
"""The same window given to the dense kernel: its cost does not fall."""
LONGEST_MASK = 2**14
"""Beyond this the mask alone would take many gigabytes."""
HUES = ("#444444", "#999999", "#2a64ad", "#74abf2", "#2e8b57", "#c2571a", "#8e44ad")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=2**15, help="longest sequence, in tokens (default: 32768)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw them here")
    args = parser.parse_args()
    lengths = [2**power for power in range(10, args.longest.bit_length()) if 2**power <= args.longest]
    rows = measured(lengths)
    Console().print(table(rows))
    if args.json:
        record = {**facts("cpu"), "heads": HEADS, "features_of_a_head": FEATURES, "threads": 1, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if args.svg:
        args.svg.write_text(picture(rows), "utf-8")
    return 0


def measured(lengths: Sequence[int]) -> list[dict[str, float | str]]:
    """Every pattern at every length, each in a process of its own, so that its peak of memory is its own."""
    rows: list[dict[str, float | str]] = []
    torch.set_num_threads(1)
    cases = [(name, length) for length in lengths for name in PATTERNS if name != MASKED or length <= LONGEST_MASK]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name, length in cases:
            rows.append({"pattern": name, "length": length, **pool.apply(measure, (name, length))})
            print(f"{name}, {length:,} tokens: {rows[-1]['seconds']:.3f} s, {rows[-1]['megabytes']:.0f} MB", file=sys.stderr)
    return rows


def measure(name: str, length: int) -> dict[str, float]:
    """Seconds of processor time of a forward and a backward pass, the best of some, and what they add to the peak of memory, in MB."""
    core, pattern = AttentionCore(0.0, "core"), PATTERNS[name]
    attend(core, FULL, 64, "")  # what the first operation of a process loads and allocates
    attend(core, pattern, 1024, name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [attend(core, pattern, length, name)]
    while len(seconds) < 3 and sum(seconds) < 0.5:
        seconds.append(attend(core, pattern, length, name))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "megabytes": (peak - before) / 1024}


def attend(core: AttentionCore, pattern: Pattern, length: int, name: str) -> float:
    """Seconds of one forward and backward pass."""
    q, k, v = (torch.randn(1, HEADS, length, FEATURES, requires_grad=True) for _ in range(3))
    sight = Sight(True, pattern)
    if name == MASKED:
        sight = Sight(True, given=sight.mask(length, length, q.device))
    begin = time.process_time()
    core(q, k, v, sight, None).sum().backward()
    return time.process_time() - begin


def table(rows: Sequence[Mapping[str, float | str]]) -> Table:
    made = Table("pattern", title=f"causal attention, forward and backward, {HEADS} heads of {FEATURES} features, float32, one thread")
    lengths = sorted({int(row["length"]) for row in rows})
    for length in lengths:
        made.add_column(f"{length:,}", justify="right")
    cells = {(row["pattern"], row["length"]): f"{row['seconds']:.2f} s\n{row['megabytes']:.0f} MB" for row in rows}
    for name in PATTERNS:
        made.add_row(name, *(cells.get((name, length), "") for length in lengths))
    return made


def picture(rows: Sequence[Mapping[str, float | str]]) -> str:
    """Time and memory over length, both axes logarithmic, as SVG."""
    body = "".join(panel(rows, key, label, 70 + 440 * number) for number, (key, label) in enumerate(PANELS.items()))
    legend = "".join(
        f'<path d="M{70 + 215 * (i % 4)} {y - 4}h22" stroke="{hue}" stroke-width="2"/><text x="{98 + 215 * (i % 4)}" y="{y}">{name}</text>'
        for i, (name, hue) in enumerate(zip(PATTERNS, HUES, strict=True))
        for y in [400 + 20 * (i // 4)]
    )
    style = 'font-family="sans-serif" font-size="12" fill="#333333"'
    frame = '<rect width="930" height="440" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 440" {style}>{frame}{body}{legend}</svg>\n'


PANELS = {"seconds": "seconds, forward and backward", "megabytes": "memory at its peak, MB"}


def panel(rows: Sequence[Mapping[str, float | str]], key: str, label: str, left: int) -> str:
    """One chart, 370 by 300, whose grid lines are powers of ten."""
    values = [max(float(row[key]), 1e-3) for row in rows]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    lengths = sorted({int(row["length"]) for row in rows})

    def across(length: float) -> float:
        return left + 370 * (math.log2(length / lengths[0]) / max(math.log2(lengths[-1] / lengths[0]), 1))

    def up(value: float) -> float:
        return 340 - 300 * (math.log10(max(value, 1e-3)) - low) / (high - low)

    parts = [f'<text x="{left}" y="24" font-weight="bold">{label}</text>']
    for power in range(low, high + 1):
        parts.append(f'<path d="M{left} {up(10**power):.1f}h370" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 8}" y="{up(10**power) + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    parts += [f'<text x="{across(n):.1f}" y="360" text-anchor="middle">{n // 1024}k</text>' for n in lengths]
    for name, hue in zip(PATTERNS, HUES, strict=True):
        dots = [(across(float(row["length"])), up(float(row[key]))) for row in rows if row["pattern"] == name]
        parts.append(f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in dots)}" fill="none" stroke="{hue}" stroke-width="2"/>')
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
