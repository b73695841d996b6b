"""The page of a report: its frame, its style, and how numbers are written on it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from html import escape

from teratron.train.history import Event, number


def compact(value: float) -> str:
    """Three digits and a unit, as in 124 M."""
    for unit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= unit * 0.9995:
            scaled = value / (1e3 if unit == 1e4 else unit)
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled) + 1e-9))}f}{suffix}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """As in 96 ms, 41.2 s, 3 min 12 s, 2 h 05 min, 3 d 4 h."""
    if seconds < 59.95:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def visible(text: str) -> str:
    """Escaped text whose control characters, which HTML forbids, are shown by their Unicode pictures."""
    return escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


def details(event: Event) -> str:
    """An event's own fields on one short line."""
    skipped = ("event", "step", "time", "elapsed", "text", "terms", "operations", "versions", "parts")
    fields = {key: value for key, value in event.items() if key not in skipped and value is not None and value == value}
    return ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else str(value)[:80]}" for key, value in fields.items())


def when(event: Event) -> str:
    """Day and time of an event; empty where it says none."""
    time = number(event.get("time"))
    if not 0 <= time < 1e11:
        return ""
    moment = datetime.fromtimestamp(time, UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main>{main}</main></body></html>
"""

STYLE = """
:root { --page: #faf9f7; --card: #fff; --ink: #1f2428; --soft: #626b73; --line: #e4e1db; --good: #2e7d4f; --warn: #a8480f; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #15181b; --card: #1c2024; --ink: #e4e7ea; --soft: #98a2ab; --line: #30363b; --good: #6fc493; --warn: #f0965a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 44px 24px 64px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.015em; margin: 4px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.005em; margin: 44px 0 12px; }
p { margin: 0; } .soft, figcaption { color: var(--soft); font-size: 14px; }
.state { color: var(--warn); font-size: 14px; font-weight: 600; } .state.finished { color: var(--good); }
.warn { color: var(--warn); font-size: 14px; margin-top: 6px; } .empty { color: var(--soft); padding: 40px 0; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 28px 0; background: var(--line);
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tiles > div { background: var(--card); padding: 16px 18px; }
.tiles dt { font-size: 14px; color: var(--soft); } .tiles dd { margin: 0; }
.tiles dd:nth-child(2) { font-size: 27px; line-height: 1.3; font-weight: 600; letter-spacing: -.015em; font-variant-numeric: tabular-nums; }
.tiles dd.soft { font-size: 13px; line-height: 1.4; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 18px 12px; }
.narrow { display: none; } .row { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 16px; margin-top: 16px; }
section > figure + figure, details > figure { margin-top: 12px; } .row ~ figure { margin-top: 16px; }
pre, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: 13.5px; }
pre { margin: 0 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
pre b { color: var(--ink); background: var(--line); border-radius: 3px; }
.commands dt { font-size: 14px; color: var(--soft); margin-top: 12px; } .commands dd { margin: 4px 0 0; }
.commands code { display: block; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; }
details { margin: 12px 0; } summary { cursor: pointer; font-weight: 600; font-size: 15px; padding: 4px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 6px; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; border-top: 1px solid var(--line); font-weight: 400;
  overflow-wrap: anywhere; }
table th { white-space: nowrap; } td:last-child { color: var(--soft); padding-right: 0; } .changed th, .changed code { font-weight: 650; }
@media (max-width: 820px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
@media screen and (max-width: 560px) { main { padding: 28px 14px 48px; } h1 { font-size: 27px; }
  .wide { display: none; } .narrow { display: block; }
  .tiles > div { padding: 12px 14px; }
  .tiles dd:nth-child(2) { font-size: 22px; }
  tr { display: block; border-top: 1px solid var(--line); padding: 6px 0; } th, td { display: block; border: 0; padding: 1px 0; }
  figure { padding: 14px 12px 10px; } }
@media print { body { background: none; font-size: 12px; } main { max-width: none; padding: 0; }
  .row { grid-template-columns: repeat(3, 1fr); }
  .tiles { grid-template-columns: repeat(4, 1fr); } figure, tr, .tiles > div { break-inside: avoid; } h2 { break-after: avoid; } }
"""
