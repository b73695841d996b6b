"""What a config's schedules will do, before the run starts: learning rate, weight decay and batch over steps and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from teratron.config import Config
from teratron.optim import learning_rate, optim_at
from teratron.train.charts import STYLE, Series, line_chart
from teratron.train.report_page import compact

BLOCKS = "▁▂▃▄▅▆▇█"
SIZED = '<svg width="380" height="240" style="width:380px;height:240px"'
POINTS = 400
ROWS = 10


@dataclass(frozen=True)
class Moment:
    """One step of a run."""

    step: int
    tokens: int
    """Seen at its end."""
    batch: int
    """Sequences that it takes."""
    lr: float
    weight_decay: float


def moment(config: Config, step: int) -> Moment:
    """What holds in a step, from 1."""
    optim = optim_at(config, step)
    return Moment(step, config.clock.tokens(step), config.batches.size(step), learning_rate(config, step), optim.weight_decay)


def evenly(config: Config, points: int) -> list[int]:
    """At most so many steps of a run, from the first to the last."""
    last = config.train.steps - 1
    return sorted({1 + last * place // max(points - 1, 1) for place in range(points)})


def course(config: Config, points: int) -> list[Moment]:
    """About so many steps of a run, and, unless there are more of them, those at which the batch changes."""
    borders = [step for stage in config.batches.stages for step in (stage.start, stage.start + 1) if 0 < step <= config.train.steps]
    return [moment(config, step) for step in sorted({*evenly(config, points), *(borders if len(borders) <= 2 * points else ())})]


def course_text(config: Config, width: int = 60) -> str:
    """A line of each curve in blocks, a table, and the totals."""
    drawn = [moment(config, step) for step in evenly(config, width)]
    lines = []
    for name, values in (
        ("learning rate", [one.lr for one in drawn]),
        ("weight decay", [one.weight_decay for one in drawn]),
        ("batch", [float(one.batch) for one in drawn]),
    ):
        lines.append(f"{name:<13}  {_blocks(values)}  {min(values):.3g} to {max(values):.3g}")
    lines += ["", f"{'step':>10}  {'tokens':>10}  {'batch':>8}  {'learning rate':>13}  {'weight decay':>12}"]
    for one in course(config, ROWS + 1):
        lines.append(f"{one.step:>10,}  {compact(one.tokens):>10}  {one.batch:>8,}  {one.lr:>13.4g}  {one.weight_decay:>12.4g}")
    samples, tokens = config.batches.until(config.train.steps), config.clock.tokens(config.train.steps)
    lines += ["", f"in all {config.train.steps:,} steps, {samples:,} sequences, {tokens:,} tokens"]
    unreached = config.batches.unreached(config.train.steps)
    return "\n".join([*lines, unreached] if unreached else lines) + "\n"


def _blocks(values: Sequence[float]) -> str:
    """A curve from 0 to its highest value, a character for each."""
    most = max(values) or 1.0
    return "".join(BLOCKS[round(value / most * (len(BLOCKS) - 1))] for value in values)


def course_svg(config: Config) -> str:
    """The curves as a picture that stands alone."""
    drawn = course(config, POINTS)
    steps, tokens = [one.step for one in drawn], [float(one.tokens) for one in drawn]
    rates, decays = [one.lr for one in drawn], [one.weight_decay for one in drawn]
    batches = [float(one.batch) for one in drawn]
    chart = partial(line_chart, from_zero=True, width=380, height=240)
    charts = [
        chart([Series("learning rate", steps, rates)], title="Learning rate", x_label="step", y_label=""),
        chart([Series("learning rate", tokens, rates)], title="Learning rate", x_label="tokens", y_label=""),
        chart([Series("batch", steps, batches)], title="Batch", x_label="step", y_label="sequences"),
        chart([Series("weight decay", steps, decays)], title="Weight decay", x_label="step", y_label=""),
    ]
    placed = [
        f'<g transform="translate({20 + place % 2 * 400},{20 + place // 2 * 270})">{SIZED}{one.removeprefix("<svg")}</g>'
        for place, one in enumerate(charts)
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 550" width="820" height="550">'
    return f'{head}<style>{STYLE}</style><rect width="820" height="550" fill="#fff"/>{"".join(placed)}</svg>\n'
