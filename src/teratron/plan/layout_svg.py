"""A layout as one SVG page that reads on light and dark screens: the model, who holds which part of it, and the pipeline's timeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from teratron.plan.layout import Layout
from teratron.plan.layout_text import captions, degrees_line, elided, experts_text, holdings, model_line, rank_text, tensor_words
from teratron.plan.timeline import timeline_svg

STYLE = """
.layout { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
.layout text { fill: #1d2329; font-variant-numeric: tabular-nums; } .layout .soft { fill: #5f6870; }
.layout .title { font-size: 20px; font-weight: 600; } .layout .name { font-weight: 600; }
.layout .right { text-anchor: end; } .layout .middle { text-anchor: middle; }
.layout .page { fill: #fff; } .layout .cut { stroke: #fff; stroke-width: 2; } .layout .rule { stroke: #c3cad1; }
.layout .rest { fill: #dde2e7; } .layout .mine { fill: #39434d; } .layout text.number { fill: #fff; font-size: 11px; text-anchor: middle; }
@media (prefers-color-scheme: dark) {
.layout text { fill: #e6e9ec; } .layout .soft { fill: #9aa4ad; } .layout .page { fill: #14181d; } .layout .cut { stroke: #14181d; }
.layout .rule { stroke: #46505a; } .layout .rest { fill: #333c45; } .layout .mine { fill: #cfd6dc; }
}
"""
COLOURS = ((47, 109, 179), (31, 125, 130), (59, 125, 76), (138, 110, 24), (191, 85, 24), (163, 63, 105), (106, 79, 163))
"""Along the stages of a pipeline; white is legible on each, and each on white and on black."""
WIDTH, MARGIN, CELLS, ROWS = 1264, 20, 300, 10
"""Pixels of the page, its border and where cells begin; pipeline ranks that are drawn."""
CELL, GAP, SKIP = 34, 14, 46
"""Pixels of a cell's height, between cells, and of what stands for those left out."""


def layout_svg(layout: Layout, name: str) -> str:
    """The picture as an SVG file, under a title. It has no scripts and refers to nothing."""
    body = [
        _text(MARGIN, 40, name, "title"),
        _text(WIDTH - MARGIN, 40, degrees_line(layout.sizes), "right"),
        _text(MARGIN, 62, model_line(layout.config.model), "soft"),
        *_model(layout, 84),
    ]
    height = 152
    for part in (_grid, _legend, _tensor, _facts, _timeline):
        drawn, used = part(layout, height)
        body += drawn
        height += used
    label = escape(f"{name}: {degrees_line(layout.sizes)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="layout" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{label}"><title>{label}</title><style>{STYLE}</style>'
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>{"".join(body)}</svg>\n'
    )


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text{f" class={style!r}" if style else ""} x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _box(x: float, y: float, wide: float, tall: float, look: str, corner: int = 2) -> str:
    return f'<rect {look} x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" rx="{corner}"/>'


def _colour(layout: Layout, stage: int) -> str:
    """A stage's place on the way through `COLOURS`."""
    place = stage / max(1, len(layout.units) - 1) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    mixed = (one + (other - one) * (place - low) for one, other in zip(COLOURS[low], COLOURS[low + 1], strict=True))
    return 'fill="#' + "".join(f"{round(value):02x}" for value in mixed) + '"'


def _model(layout: Layout, y: int) -> Iterator[str]:
    """All units side by side, as wide as they take time, coloured by stage."""
    last = max(units.stop for units in layout.units) - 1
    thin = last / 30  # what takes little time must be seen, too
    widths = dict.fromkeys(range(last + 1), 1.0) | {0: thin, last: max(thin, layout.head_cost)}
    scale, x = (WIDTH - 2 * MARGIN) / sum(widths.values()), float(MARGIN)
    for stage, units in enumerate(layout.units):
        begin = x
        for unit in units:
            wide = widths[unit] * scale
            yield _box(x, y, max(1.0, wide - min(2.0, wide / 4)), 24, _colour(layout, stage))
            if unit in (0, last):
                yield _text(x + wide / 2 - 1, y + 16, "H" if unit else "E", "number")
            x += wide
        words = f"stage {stage}" if len(layout.units) <= 16 else str(stage)
        if len(layout.units) > 1 and (x - begin > 7 * len(words) + 6 or stage % 4 == 0):
            yield _text((begin + x) / 2, y + 40, words, "soft middle")


@dataclass(frozen=True)
class _Columns:
    """The tensor groups that are drawn, None for those left out, and the pixels of each."""

    shown: list[int | None]
    wide: float

    @staticmethod
    def of(layout: Layout) -> _Columns:
        room, count = WIDTH - MARGIN - CELLS + GAP, len(layout.places)
        least = min(max(96, 30 * layout.sizes["tensor"]), 272) + GAP
        shown = elided(count, int(room // least))
        if None in shown:
            room -= SKIP + GAP
            shown = elided(count, int(room // least) + 1)
        return _Columns(shown, min(300, room / len([one for one in shown if one is not None]) - GAP))

    def begin(self, place: int) -> float:
        """Where a column begins."""
        skipped = None in self.shown[:place]
        return CELLS + (place - skipped) * (self.wide + GAP) + skipped * (SKIP + GAP)

    def end(self, place: int) -> float:
        """Where it ends."""
        return self.begin(place) + (SKIP if self.shown[place] is None else self.wide)


def _grid(layout: Layout, y: int) -> tuple[list[str], int]:
    """A row a pipeline rank, a cell a tensor group; above them which copy, shard and context they are."""
    columns = _Columns.of(layout)
    named = [axis for axis in layout.places[0] if layout.sizes[axis] > 1]
    drawn = [mark for level, _ in enumerate(named) for mark in _brackets(layout, columns, named[: level + 1], y + 18 * level)]
    levels = len(named) + (layout.config.parallel.expert > 1)
    if levels > len(named):
        held = [(columns.begin(n), "..." if place is None else experts_text(layout, place)) for n, place in enumerate(columns.shown)]
        drawn += [_text(x, y + 18 * len(named) + 4, words, "soft") for x, words in held]
    top = y + 18 * levels + (6 if levels else 0)
    bars = 8 * (layout.sizes["context"] > 1) + 8 * (_owners(layout) > 1)
    step = CELL + bars + 10
    rows = elided(len(layout.held), ROWS)
    for row, rank in enumerate(rows):
        line = top + row * step
        if rank is None:
            drawn.append(_text(MARGIN, line + CELL / 2 + 4, f"... {len(layout.held) - len(rows) + 1} more pipeline ranks", "soft"))
            continue
        drawn.append(_text(MARGIN, line + 14, f"pipeline rank {rank}", "name"))
        drawn.append(_text(MARGIN, line + 29, rank_text(layout, rank, 44), "soft"))
        for place, column in enumerate(columns.shown):
            x = columns.begin(place)
            drawn += (
                [_text(x + SKIP / 2, line + 20, "...", "middle")] if column is None else _cell(layout, rank, column, x, line, columns.wide)
            )
    return drawn, top + len(rows) * step - y


def _brackets(layout: Layout, columns: _Columns, axes: Sequence[str], y: int) -> Iterator[str]:
    """Lines over neighbours that have the same place on some axes, named by the last of them."""
    places = [None if column is None else tuple(layout.places[column][axis] for axis in axes) for column in columns.shown]
    for place, run in groupby(range(len(places)), key=lambda number: places[number]):
        numbers = list(run)
        x, end = columns.begin(numbers[0]), columns.end(numbers[-1])
        if place is None:
            yield _text((x + end) / 2, y + 4, "...", "soft middle")
            continue
        words = f"{'copy' if axes[-1] == 'replicate' else axes[-1]} {place[-1]}"
        yield _text(x, y + 4, words, "soft")
        if end > x + 6.6 * len(words) + 8:
            yield f'<path class="rule" fill="none" d="M{x + 6.6 * len(words) + 6:.1f} {y}H{end:.1f}v4"/>'


def _cell(layout: Layout, rank: int, column: int, x: float, y: float, wide: float) -> Iterator[str]:
    """A tensor group: a band for each stage, a slice for each rank; bars tell its tokens and its share of the state."""
    tokens, owners, tensor = _tokens(layout, column), _owners(layout), layout.sizes["tensor"]
    if tokens:
        yield from _bar(x, y, wide, tokens)
        y += 8
    held = layout.held[rank]
    for band, stage in enumerate(held):
        yield _box(x, y + band * CELL / len(held), wide, CELL / len(held), _colour(layout, stage), 3 if len(held) == 1 else 0)
    if wide / tensor > 4:
        cuts = "".join(f"M{x + wide * n / tensor:.1f} {y}v{CELL}" for n in range(1, tensor))
        yield f'<path class="cut" d="{cuts}"/>' if cuts else ""
    ranks = layout.ranks(rank, column)
    fits = wide / tensor > 7 * len(str(layout.world)) + 2
    for place, words in enumerate(map(str, ranks)) if fits else [(0.0, f"{ranks[0]}-{ranks[-1]}")]:
        middle = x + wide * (place + 0.5) / tensor if fits else x + wide / 2
        yield _text(middle, y + CELL / 2 + 4, words, "number")
    if owners > 1:
        at = layout.places[column]
        own = at["shard"] * layout.sizes["context"] + at["context"]
        yield from _bar(x, y + CELL + 3, wide, [number == own for number in range(owners)])


def _owners(layout: Layout) -> int:
    """Ranks that share state."""
    return layout.sizes["shard"] * layout.sizes["context"] if layout.config.parallel.shard != "none" else 1


def _tokens(layout: Layout, column: int) -> list[bool]:
    """Which chunks of a sequence a context rank has: of a ring one from the beginning and the one as far from the end."""
    ranks, own = layout.sizes["context"], layout.places[column]["context"]
    ring = layout.config.parallel.context_method == "ring"
    return [own in (number, 2 * ranks - 1 - number) if ring else own == number for number in range(ranks * (1 + ring))] if ranks > 1 else []


def _bar(x: float, y: float, wide: float, marks: Sequence[bool]) -> Iterator[str]:
    """A line in equal pieces, of which some are marked, never too thin to be seen."""
    yield _box(x, y, wide, 5, 'class="rest"')
    for number in (number for number, mark in enumerate(marks) if mark):
        yield _box(x + wide * number / len(marks), y, max(2.0, wide / len(marks)), 5, 'class="mine"')


def _legend(layout: Layout, y: int) -> tuple[list[str], int]:
    """What the marks of the grid mean."""
    shared = {"optimizer": "optimizer state", "gradients": "gradients and optimizer state", "parameters": "whole state"}
    words = ["E embedding, H head", "number: global rank"]
    words += ["slice: tensor rank"] if layout.sizes["tensor"] > 1 else []
    words += ["colour: stage, one band each"] if len(layout.held[0]) > 1 else ["colour: stage"] if len(layout.held) > 1 else []
    words += ["bar above: its tokens of each sequence"] if layout.sizes["context"] > 1 else []
    words += [f"bar below: its share of the {shared[layout.config.parallel.shard]}"] if _owners(layout) > 1 else []
    words += ["experts: of each layer, | between tensor ranks"] if layout.config.parallel.expert > 1 else []
    words += ["copies: hold the same, see other sequences"] if layout.sizes["replicate"] > 1 else []
    lines = [words[start : start + 4] for start in range(0, len(words), 4)]
    return [_text(CELLS, y + 12 + 18 * number, " · ".join(line), "soft") for number, line in enumerate(lines)], 22 + 18 * len(lines)


def _tensor(layout: Layout, y: int) -> tuple[list[str], int]:
    """What of the matrices the first tensor rank holds."""
    ranks = layout.sizes["tensor"]
    if ranks == 1:
        return [], 0
    drawn = [_text(MARGIN, y + 27, "a tensor rank holds", "name")]
    for number, words in enumerate(tensor_words(layout)):
        x, side, by_rows = CELLS + 236 * number, 44, "rows" in words
        drawn.append(_box(x, y, side, side, 'class="rest"'))
        drawn.append(_box(x, y, side / (1 if by_rows else ranks), side / (ranks if by_rows else 1), _colour(layout, 0)))
        cuts = [side * n / ranks for n in range(1, ranks)] if ranks <= 16 else []
        path = "".join(f"M{x} {y + cut:.1f}h{side}" if by_rows else f"M{x + cut:.1f} {y}v{side}" for cut in cuts)
        drawn.append(f'<path class="cut" style="stroke-width: 1" d="{path}"/>')
        count, of, total, what = words.split(" ", 3)
        drawn += [_text(x + side + 10, y + 19, f"{count} {of} {total}"), _text(x + side + 10, y + 35, what, "soft")]
    return drawn, 70


def _facts(layout: Layout, y: int) -> tuple[list[str], int]:
    """The rest in words."""
    lines = {name: words for name, words in holdings(layout).items() if name != "a tensor rank"}
    drawn = [
        mark
        for number, (name, words) in enumerate(lines.items())
        for mark in (_text(MARGIN, y + 18 * number + 8, name, "name"), _text(CELLS, y + 18 * number + 8, ", ".join(words)))
    ]
    return drawn, 18 * len(lines) + 14


def _timeline(layout: Layout, y: int) -> tuple[list[str], int]:
    """The pipeline's own picture, and what must be said about it."""
    drawn, used = [], 0
    if layout.pipeline is not None:
        picture = timeline_svg(layout.pipeline.drawn)
        used = int(picture.partition(' height="')[2].partition('"')[0])
        drawn.append(picture.replace("<svg ", f'<svg x="0" y="{y}" ', 1))
    drawn += [_text(MARGIN, y + used + 14 + 18 * number, words, "soft") for number, words in enumerate(captions(layout))]
    return drawn, used + 18 * len(captions(layout)) + 16
