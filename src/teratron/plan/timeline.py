"""The picture of a pipeline's timeline: as text for a terminal, and as an SVG file that reads on light and dark screens."""

from __future__ import annotations

from collections import defaultdict

from teratron.parallel.schedule_actions import Action, Kind
from teratron.parallel.simulate import Span, Timeline, peak_activations

NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward of inputs",
    Kind.BACKWARD_WEIGHT: "backward of weights",
}

STYLE = """
.timeline { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
.timeline text { fill: #1d2329; font-variant-numeric: tabular-nums; } .timeline .soft { fill: #5f6870; }
.timeline .title { font-size: 15px; font-weight: 600; } .timeline .right { text-anchor: end; }
.timeline .paper { fill: #fff; } .timeline .idle { fill: #eceff3; }
.timeline .cells text { text-anchor: middle; font-size: 11px; fill: #fff; } .timeline .cells .small { font-size: 9.5px; }
.timeline .cells .tint { fill: #14202c; } .timeline path { stroke-linejoin: round; }
.timeline .F { fill: #2f6db3; stroke: #2f6db3; } .timeline .F.tint { fill: #a9cbee; stroke: #a9cbee; }
.timeline .B { fill: #bf5518; stroke: #bf5518; } .timeline .B.tint { fill: #f3bd95; stroke: #f3bd95; }
.timeline .I { fill: #a33f69; stroke: #a33f69; } .timeline .I.tint { fill: #eab4c9; stroke: #eab4c9; }
.timeline .W { fill: #3b7d4c; stroke: #3b7d4c; } .timeline .W.tint { fill: #acd5b5; stroke: #acd5b5; }
@media (prefers-color-scheme: dark) {
.timeline text { fill: #e6e9ec; } .timeline .soft { fill: #9aa4ad; } .timeline .paper { fill: #14181d; } .timeline .idle { fill: #252c34; }
}
"""
LEFT, RIGHT, TOP = 74, 70, 86
"""Pixels around the rows: ranks, peaks, title and legend."""


def timeline_text(timeline: Timeline, width: int = 100) -> str:
    """One line a rank, one column a slice of time; a dot is idle time, and an action reaches up to the next letter or dot.

    Micro-batch numbers stand beside the letters where there is room. No line is longer than `width`, as long as that is 60 or more.
    """
    label = len(f"rank {timeline.schedule.ranks - 1} ")
    columns = max(1, width - label - 2)
    shortest = _shortest(timeline)
    room = shortest * columns / timeline.end
    scale = (min(4, int(room)) if room >= 1 else room) / shortest  # whole columns, so that equal actions look equal
    used = max(1, round(timeline.end * scale))
    rows = [f"{f'rank {rank} ':<{label}}|{_row(timeline, rank, used, scale)}|" for rank in range(timeline.schedule.ranks)]
    return "\n".join([*_wrap(_facts(timeline), " · ", width), *rows, *_wrap(_legend(timeline), "   ", width)]) + "\n"


def _row(timeline: Timeline, rank: int, columns: int, scale: float) -> str:
    """A rank's line; of actions that share a column, the one that is there at its middle."""
    cells = ["·"] * columns
    for span in timeline.computing(rank):
        start, stop = (max(0, round(time * scale)) for time in (span.start, span.end))
        if start < min(stop, columns):
            cells[start:stop] = _label(timeline, rank, span.action, stop - start).ljust(stop - start)[: columns - start]
    return "".join(cells)


def _label(timeline: Timeline, rank: int, action: Action, room: int) -> str:
    """Such as `F3`, or `f3` on a rank's second chunk, or `F` where only that fits; `X` is an overlap without room."""
    words = [_letter(timeline, rank, part) + str(part.micro_batch) for part in action.computations]
    full = "".join(words)
    return full if len(full) <= room else "X" if action.parts else full[0]


def _letter(timeline: Timeline, rank: int, action: Action) -> str:
    return action.kind.value.lower() if _tinted(timeline, rank, action) else action.kind.value


def _tinted(timeline: Timeline, rank: int, action: Action) -> bool:
    """Every other chunk of a rank looks different."""
    return timeline.schedule.placement[rank].index(action.stage) % 2 == 1


def _spans(timeline: Timeline) -> list[tuple[int, Span]]:
    """Everything that takes time, with its rank."""
    return [(rank, span) for rank in range(timeline.schedule.ranks) for span in timeline.computing(rank) if span.end > span.start]


def _shortest(timeline: Timeline) -> float:
    return min(span.end - span.start for _, span in _spans(timeline))


def _used(timeline: Timeline) -> set[Kind]:
    return {part.kind for _, span in _spans(timeline) for part in span.action.computations}


def _facts(timeline: Timeline) -> list[str]:
    """What stands above the picture."""
    schedule = timeline.schedule
    return [
        schedule.name,
        _count(schedule.ranks, "rank"),
        *([_count(schedule.chunks, "chunk") + " each"] if schedule.chunks > 1 else []),
        _count(schedule.micro_batches, "micro-batch", "micro-batches"),
        f"bubble {100 * timeline.bubble:.1f} %",
        f"peak activations {_number(max(peak_activations(schedule)))}",
    ]


def _count(number: int, name: str, names: str | None = None) -> str:
    return f"{number} {name if number == 1 else names or name + 's'}"


def _number(value: float) -> str:
    return f"{round(value, 2):g}"


def _legend(timeline: Timeline) -> list[str]:
    used = _used(timeline)
    overlaps = any(span.action.parts for _, span in _spans(timeline))
    return [
        *(f"{kind.value} {name}" for kind, name in NAMES.items() if kind in used),
        *(["X forward and backward at once"] if overlaps else []),
        "· idle",
        *([_tint_name(timeline, "small letters")] if timeline.schedule.chunks > 1 else []),
    ]


def _tint_name(timeline: Timeline, what: str) -> str:
    return f"{what}: {'second chunk' if timeline.schedule.chunks == 2 else 'every second chunk'}"


def _wrap(words: list[str], separator: str, width: int) -> list[str]:
    """The words in lines."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(separator) + len(word) <= width:
            lines[-1] += separator + word
        else:
            lines.append(word)
    return lines


def timeline_svg(timeline: Timeline) -> str:
    """An SVG file: one row a rank, colours by kind, micro-batch numbers where there is room, each rank's peak activations at the end.

    An overlap is a forward above a backward. Peaks are in micro-batches of what a rank keeps for one of them over all its chunks.
    """
    shortest = _shortest(timeline)
    scale = min(1080 / timeline.end, 44 / shortest)
    row = 30 if timeline.schedule.ranks <= 16 else 20 if timeline.schedule.ranks <= 32 else 14
    width = max(700, LEFT + timeline.end * scale + RIGHT)
    height = TOP + row * timeline.schedule.ranks + 20
    title = " · ".join(_facts(timeline))
    body = [
        f'<rect class="paper" width="{width:.0f}" height="{height}" rx="8"/>',
        f'<text class="title" x="20" y="32">{timeline.schedule.name}</text>',
        f'<text class="soft right" x="{width - 20:.0f}" y="32">{" · ".join(_facts(timeline)[1:])}</text>',
        *_svg_legend(timeline),
        f'<text class="soft right" x="{width - 20:.0f}" y="{TOP - 8}">peak</text>',
        *_svg_ranks(timeline, scale, row, width),
        *_svg_cells(timeline, scale, row),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="timeline" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" aria-label="{title}"><title>{title}</title><style>{STYLE}</style>{"".join(body)}</svg>\n'
    )


def _svg_legend(timeline: Timeline) -> list[str]:
    used = _used(timeline)
    entries = [(f"{kind.value}", name) for kind, name in NAMES.items() if kind in used] + [("idle", "idle")]
    tint = [_tint_name(timeline, "light")] if timeline.schedule.chunks > 1 else []
    parts, x = [], 20.0
    for style, name in entries:
        parts.append(f'<rect class="{style}" stroke="none" x="{x:.0f}" y="47" width="12" height="12" rx="3"/>')
        parts.append(f'<text class="soft" x="{x + 18:.0f}" y="57">{name}</text>')
        x += 18 + 6.6 * len(name) + 16
    return parts + [f'<text class="soft" x="{x:.0f}" y="57">{text}</text>' for text in tint]


def _svg_ranks(timeline: Timeline, scale: float, row: int, width: float) -> list[str]:
    """Names on the left, the idle background, and peak activations on the right."""
    parts = []
    for rank, peak in enumerate(peak_activations(timeline.schedule)):
        y = TOP + rank * row
        middle = y + row / 2 + 4
        parts += [
            f'<text class="soft" x="20" y="{middle:.0f}">rank {rank}</text>',
            f'<rect class="idle" x="{LEFT}" y="{y + 1}" width="{timeline.end * scale:.1f}" height="{row - 2}" rx="3"/>',
            f'<text class="soft right" x="{width - 20:.0f}" y="{middle:.0f}">{_number(peak)}</text>',
        ]
    return parts


def _svg_cells(timeline: Timeline, scale: float, row: int) -> list[str]:
    """All cells of one colour are one path, so that thousands stay a small file; its stroke rounds their corners."""
    narrowest = scale * _shortest(timeline)
    corner = max(0.0, min(3.0, narrowest / 4 - 0.5))
    gap = min(0.75, narrowest / 8)
    paths: dict[str, list[str]] = defaultdict(list)
    numbers = []
    for rank, span in _spans(timeline):
        parts = span.action.computations
        x, wide, tall = LEFT + span.start * scale, (span.end - span.start) * scale, (row - 2) / len(parts)
        for half, part in enumerate(parts):
            style = part.kind.value + (" tint" if _tinted(timeline, rank, part) else "")
            y = TOP + rank * row + 1 + half * tall
            paths[style].append(_box(x, y, wide, tall, gap + corner / 2))
            numbers += _svg_number(part.micro_batch, style, x + wide / 2, y + tall / 2, wide, tall)
    cells = [f'<path class="{style}" stroke-width="{corner:.1f}" d="{"".join(path)}"/>' for style, path in sorted(paths.items())]
    return ['<g class="cells">', *cells, *numbers, "</g>"]


def _box(x: float, y: float, wide: float, tall: float, inset: float) -> str:
    return f"M{x + inset:.1f} {y + inset:.1f}h{wide - 2 * inset:.1f}v{tall - 2 * inset:.1f}h-{wide - 2 * inset:.1f}z"


def _svg_number(number: int, style: str, x: float, y: float, wide: float, tall: float) -> list[str]:
    """A micro-batch's number in the middle of its cell, where it fits."""
    if wide < 6.5 * len(str(number)) + 3 or tall < 10:
        return []
    names = " ".join([*style.split()[1:], *(["small"] if tall < 16 else [])])
    return [f'<text{f" class={names!r}" if names else ""} x="{x:.1f}" y="{y + (4 if tall >= 16 else 3.3):.1f}">{number}</text>']
