"""The picture of races: how many times as fast as each peer this project is, a panel a workload and precision."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from teratron.config import UserError

Panels = dict[str, dict[str, float]]
"""Title of a panel -> peer -> our speed over its."""


def draw(results: Path, picture: Path) -> None:
    """Draw the races in `results`, lines that `--json` has written, of each contender's the newest, into an SVG, PNG or PDF.

    Raises `UserError` for a file without races, and without matplotlib.
    """
    try:
        lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--json {results}: {error}; expected the lines that bench/train.py --json has written") from None
    drawn = panels(lines)
    if not drawn:
        raise UserError(f"--json {results}: no race with a peer is in it; run one with --json {results} first")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"--picture {picture}: matplotlib is not installed; pip install matplotlib") from None
    figure = Figure((4.2 * len(drawn), 0.6 + 0.32 * max(map(len, drawn.values()))), layout="constrained")
    widest = max(max(ratios.values()) for ratios in drawn.values())
    for axes, (title, ratios) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        fill(axes, title, ratios, widest)
        axes.set_ylim(-0.6, max(map(len, drawn.values())) - 0.4)
    figure.savefig(picture)


def panels(lines: Iterable[Mapping[str, Any]]) -> Panels:
    """The ratios of all races, panels in the order of their names, peers from the slowest to the fastest."""
    found: Panels = {}
    for line in lines:
        if "contenders" not in line:
            continue
        title = f"{line['workload']}, {line['precision']}{', same switches' * line.get('switches', False)}"
        ratios = {name: lane["ours_is"] for name, lane in line["contenders"].items() if name != "teratron"}
        if ratios:
            found.setdefault(title, {}).update(ratios)
    return {title: dict(sorted(found[title].items(), key=lambda item: -item[1])) for title in sorted(found)}


def fill(axes: Any, title: str, ratios: Mapping[str, float], widest: float) -> None:
    """One panel: a bar a peer, a line where both are equally fast."""
    bars = axes.barh(list(ratios), list(ratios.values()), color="#4878a8", height=0.66)
    axes.bar_label(bars, fmt="%.2f x", padding=3, fontsize=8)
    axes.axvline(1, color="#b04040", linewidth=1)
    axes.set_xlim(0, widest * 1.18)
    axes.set_title(f"{title}: teratron is", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
