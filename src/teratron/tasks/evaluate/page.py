"""The page of an evaluation: metrics with their intervals, and the examples that went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from teratron.checkpoint.format import write_synced
from teratron.tasks.evaluate.report import Report
from teratron.tasks.evaluate.task import Mistake
from teratron.tasks.metrics import Estimate
from teratron.train.report_page import PAGE, STYLE, duration, visible

LONGEST = 1200
"""Characters of a question that are shown; of a longer one its end."""
OWN_STYLE = """
.tiles { grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.metrics td:nth-child(2) { font-weight: 650; font-variant-numeric: tabular-nums; }
.metrics svg { width: 100%; min-width: 160px; height: 18px; }
.metrics th { width: 190px; } .metrics td { white-space: nowrap; width: 110px; } .metrics td:last-child { width: auto; }
.metrics .line { stroke: var(--line); } .metrics .span { stroke: var(--good); stroke-width: 5; stroke-linecap: round; opacity: .35; }
.metrics circle { fill: var(--good); } .metrics text { fill: var(--soft); font-size: 10px; }
.wrong td { width: 22%; } .wrong td:first-child { width: 56%; white-space: pre-wrap; } .wrong td:last-child { color: var(--warn); }
.wrong th { color: var(--soft); font-size: 13px; border-top: 0; } .facts { margin: 10px 0 4px; }
"""


def write_page(reports: Sequence[Report], model: str, path: Path) -> None:
    """One self-contained HTML file."""
    tiles = "".join(map(_tile, reports))
    head = f'<header><p class="state finished">evaluation</p><h1>{visible(model)}</h1></header><dl class="tiles">{tiles}</dl>'
    main = head + "".join(map(_section, reports))
    write_synced(path, PAGE.format(title=visible(model), style=STYLE + OWN_STYLE, main=main).encode("utf-8", "replace"))


def shown(value: float) -> str:
    """A metric's value, short."""
    if math.isnan(value):
        return "none"
    if (value and abs(value) < 1e-3) or abs(value) >= 1e9:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def fact_texts(report: Report) -> Iterator[str]:
    """How many examples, what else a reader must know, and how long it took."""
    yield f"{report.count:,} examples"
    for name, value in report.facts.items():
        yield f"{name} {f'{value:,}' if isinstance(value, int) else shown(value) if isinstance(value, float) else value}"
    yield duration(report.seconds)


def _tile(report: Report) -> str:
    name, found = next(iter(report.metrics.items()))
    title = f"{report.task}, {Path(report.file).name}"
    return f'<div><dt>{visible(title)}</dt><dd>{shown(found.value)}</dd><dd class="soft">{_words(name)}, {_between(found)}</dd></div>'


def _section(report: Report) -> str:
    rows = "".join(_row(name, found) for name, found in report.metrics.items())
    facts = " · ".join(map(escape, fact_texts(report)))
    title = f"{visible(report.task)} <span class=soft>{visible(Path(report.file).name)}</span>"
    return f'<section><h2>{title}</h2><table class="metrics">{rows}</table><p class="soft facts">{facts}</p>{_wrong(report)}</section>'


def _row(name: str, found: Estimate) -> str:
    return f"<tr><th>{_words(name)}</th><td>{shown(found.value)}</td><td>{_between(found)}</td><td>{_drawn(found)}</td></tr>"


def _words(name: str) -> str:
    return escape(name.replace("_", " "))


def _between(found: Estimate) -> str:
    return f"{shown(found.low)} to {shown(found.high)}"


def _drawn(found: Estimate) -> str:
    """The interval on a line from 0 to 1, or to 100; nothing for what has no such scale."""
    if not 0 <= found.low <= found.value <= found.high <= 1:
        return ""
    low, value, high = (2 + 196 * x for x in (found.low, found.value, found.high))
    return (
        '<svg viewBox="0 0 200 12" preserveAspectRatio="xMinYMid" role="img" aria-label="from 0 to 1">'
        f'<line class="line" x1="2" x2="198" y1="6" y2="6"/>'
        f'<line class="span" x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6"/><circle cx="{value:.1f}" cy="6" r="2.6"/></svg>'
    )


def _wrong(report: Report) -> str:
    if not report.wrong:
        return ""
    if report.wrong_count is None:
        title = f"The {len(report.wrong)} hardest"
    else:
        few = f", {len(report.wrong)} of them here" if report.wrong_count > len(report.wrong) else ""
        title = f"{report.wrong_count:,} of {report.count:,} went wrong{few}"
    expected = any(mistake.expected for mistake in report.wrong)
    head = "<tr><th>read</th>" + "<th>expected</th>" * expected + "<th>found</th></tr>"
    rows = "".join(_mistake(mistake, expected) for mistake in report.wrong)
    return f'<details open><summary>{title}</summary><table class="wrong">{head}{rows}</table></details>'


def _mistake(mistake: Mistake, expected: bool) -> str:
    question = mistake.question if len(mistake.question) <= LONGEST else f"… {mistake.question[-LONGEST:]}"
    cells = [question, *([mistake.expected] if expected else []), mistake.found]
    return f"<tr>{''.join(f'<td>{visible(cell)}</td>' for cell in cells)}</tr>"
