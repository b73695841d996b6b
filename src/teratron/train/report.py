"""A run's report: one self-contained HTML page made of nothing but the run's config.toml and metrics.jsonl."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import os
import shlex
import statistics
import tomllib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from teratron.config import Config, UserError
from teratron.config.keys import field_docs
from teratron.train import charts
from teratron.train.charts import Rule, Series, line_chart

Event = dict[str, Any]
COLUMNS = ("step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "mfu")
SAMPLES_SHOWN, EVENTS_SHOWN = 40, 200
"""So that the page of a very long run stays small."""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the files of the run directory; a former report is replaced in one move.

    Raises UserError for a folder that holds no run, an unreadable config.toml, or a page that cannot be written.
    """
    if not (run / "config.toml").is_file() and not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run}: found neither config.toml nor metrics.jsonl; give the folder of a run (the --run of `teratron train`)")
    page = _page(run, read_config(run / "config.toml"), read_history(run / "metrics.jsonl"))
    path = run / "report.html"
    draft = run / f".report.{os.getpid()}.tmp"
    try:
        draft.write_bytes(page.encode("utf-8", "replace"))
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the report ({error.strerror}): free space or make the folder writable") from None
    return path


@dataclass
class History:
    """What metrics.jsonl tells: the steps as columns of float64 (NaN = missing), every other event as it came.

    Of a step that ran twice, because a run was interrupted after its last checkpoint, the later line counts.
    """

    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    events: list[Event] = field(default_factory=list)
    start: Event = field(default_factory=dict)
    """What the last process to begin told about itself; its time is the first one's."""
    unreadable: int = 0
    wall: float = 0.0
    _clock: float = math.nan

    def add(self, event: Event) -> None:
        kind, step = event.get("event"), number(event.get("step"))
        time = number(event.get("time"))
        begins = kind in ("start", "resume")
        gap = 0.0 if begins else time - self._clock
        self.wall += gap if math.isfinite(gap) else 0.0
        self._clock = time if math.isfinite(time) else self._clock
        if kind == "step" and math.isfinite(step):
            self._forget(step)
            for name, column in self.columns.items():
                column.append(number(event.get(name)))
        elif begins:
            self._forget(step + 1)
            self.start = event | {"time": self.start.get("time", event.get("time"))}
        if kind != "step" and isinstance(kind, str):
            self.events.append(event)

    def _forget(self, step: float) -> None:
        while self.columns["step"] and self.columns["step"][-1] >= step:
            for column in self.columns.values():
                column.pop()

    def of_kind(self, kind: str) -> list[Event]:
        """Events of a kind by step, less those after the checkpoint that a run resumed from; the later of two alike."""
        kept: dict[tuple[Any, ...], Event] = {}
        for event in self.events:
            if event["event"] in ("start", "resume"):
                kept = {key: old for key, old in kept.items() if not number(old.get("step")) > number(event.get("step"))}
            elif event["event"] == kind:
                kept[tuple(str(event.get(name)) for name in ("step", "name", "prompt", "text"))] = event
        return sorted(kept.values(), key=_step)

    def last(self, name: str) -> float:
        return self.columns[name][-1] if self.columns[name] else math.nan

    def median(self, name: str) -> float:
        known = [value for value in self.columns[name] if math.isfinite(value)]
        return statistics.median(known) if known else math.nan


def read_history(path: Path) -> History:
    """Read metrics.jsonl; lines that are no JSON object, such as one cut by a crash, are counted and left out."""
    history = History()
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    history.add(dict(json.loads(line)))
                except (ValueError, TypeError):
                    history.unreadable += 1
    return history


def read_config(path: Path) -> dict[str, Any]:
    """config.toml as `section.key` -> value, also of another version whose keys this one does not know; {} without a file."""
    if not path.is_file():
        return {}
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}; restore it from a checkpoint of the run") from None
    return {f"{section}.{key}": value for section, table in tree.items() if isinstance(table, dict) for key, value in table.items()}


def smooth(x: Sequence[float], y: Sequence[float], points: int = 1000) -> tuple[list[float], list[float], int]:
    """Centred moving mean over 2 % of a curve, at `points` places; returns x, y and the steps of a window.

    Near the beginning the window shrinks evenly on both sides, so that a steep fall is not smoothed away.
    """
    reach = len(x) // 100
    sums = list(accumulate((v if math.isfinite(v) else 0.0 for v in y), initial=0.0))
    counts = list(accumulate((math.isfinite(v) for v in y), initial=0))
    places = sorted({round(i * (len(x) - 1) / (points - 1)) for i in range(points)}) if len(x) > points else range(len(x))
    means = []
    for i in places:
        half = min(reach, i)
        start, end = i - half, min(i + half + 1, len(x))
        known = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / known if known and math.isfinite(y[i]) else math.nan)
    return [x[i] for i in places], means, 2 * reach + 1


def number(value: Any) -> float:
    """A float, NaN for everything that is no usable number."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e290 else math.nan


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


def _step(event: Event) -> float:
    step = number(event.get("step"))
    return step if math.isfinite(step) else 0.0


def _perplexity(event: Event) -> float:
    given, loss = number(event.get("perplexity")), number(event.get("loss"))
    return given if math.isfinite(given) else math.exp(min(loss, 600.0))


def _page(run: Path, config: dict[str, Any], history: History) -> str:
    name = escape(run.resolve().name)
    main = "".join(
        [
            _header(name, config, history),
            _tiles(history),
            _charts(config, history),
            _samples(history.of_kind("sample")),
            _commands(run, config, history),
            _config(config),
            _events(history.events),
        ]
    )
    return PAGE.format(title=name, style=STYLE + charts.STYLE, main=main)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main>{main}</main></body></html>
"""


def _header(name: str, config: dict[str, Any], history: History) -> str:
    """State, title, where and when it ran, and what a reader must know before trusting the numbers."""
    step, goal = history.last("step"), number(config.get("train.steps"))
    ends = [event for event in history.events if event["event"] in ("start", "resume", "end")]
    state = {"done": "finished", "interrupted": "interrupted"}.get(str(ends[-1].get("reason")) if ends else "", "not finished")
    target = f" of {goal:,.0f}" if math.isfinite(goal) and goal != step else ""
    progress = f" · step {step:,.0f}{target}" if math.isfinite(step) else ""
    versions = history.start.get("versions")
    facts = [
        f"started {_when(history.start)}" if _when(history.start) else "",
        *(str(history.start.get(key) or "") for key in ("device", "precision")),
        *(f"{package} {version}" for package, version in (versions.items() if isinstance(versions, dict) else ())),
    ]
    wrong, lines = sum(not math.isfinite(value) for value in history.columns["loss"]), history.unreadable
    notes = [f"At {wrong:,} of {len(history.columns['loss']):,} steps the loss is not a finite number."] if wrong else []
    notes += (
        [f"metrics.jsonl has {lines:,} unreadable line{'s' * (lines > 1)}, left out here (a crash leaves one half-written)."]
        if lines
        else []
    )
    warnings = "".join(f'<p class="warn">{note}</p>' for note in notes)
    line = f'<p class="soft">{" · ".join(escape(fact) for fact in facts if fact)}</p>'
    return f'<header><p class="state {state.split()[0]}">{state}{progress}</p><h1>{name}</h1>{line}{warnings}</header>\n'


def _tiles(history: History) -> str:
    """The run in a few numbers; a tile whose number is unknown is left out."""
    tiles = [*_loss_tiles(history), *_size_tiles(history), *_speed_tiles(history)]
    if not tiles:
        return ""
    shown = (f'<div><dt>{label}</dt><dd>{value}</dd><dd class="soft">{escape(note)}</dd></div>' for label, value, note in tiles)
    return f'<dl class="tiles">{"".join(shown)}</dl>\n'


def _loss_tiles(history: History) -> Iterable[tuple[str, str, str]]:
    evals = [event for event in history.of_kind("eval") if math.isfinite(number(event.get("loss")))]
    if evals:
        best, last = min(evals, key=lambda event: number(event["loss"])), evals[-1]
        yield "Held-out perplexity", f"{_perplexity(best):,.2f}", _against_bigram(history, _perplexity(best))
        at = f"at step {_step(best):,.0f}"
        yield "Held-out loss", f"{best['loss']:.3f}", at if best is last else f"best, {at}; last {last['loss']:.3f}"
    loss, count = history.columns["loss"], len(history.columns["loss"]) // 50
    if math.isfinite(history.last("loss")):
        recent = [value for value in loss[-count:] if math.isfinite(value)] if count > 1 else []
        yield (
            "Training loss",
            f"{loss[-1]:.3f}",
            f"last step; mean of the last {count:,}: {statistics.fmean(recent):.3f}" if recent else "last step",
        )


def _bigram(history: History) -> Event | None:
    found = [event for event in history.of_kind("baseline") if event.get("name") == "bigram" and math.isfinite(number(event.get("loss")))]
    return found[-1] if found else None


def _against_bigram(history: History, perplexity: float) -> str:
    bigram = _bigram(history)
    if bigram is None:
        return ""
    ratio = _perplexity(bigram) / perplexity
    return f"{max(ratio, 1 / ratio):,.1f} times {'lower' if ratio >= 1 else 'higher'} than a bigram model's {_perplexity(bigram):,.2f}"


def _size_tiles(history: History) -> Iterable[tuple[str, str, str]]:
    parameters, vocabulary = number(history.start.get("parameters")), number(history.start.get("vocab_size"))
    if math.isfinite(parameters):
        yield "Parameters", compact(parameters), f"vocabulary of {vocabulary:,.0f} tokens" if math.isfinite(vocabulary) else ""
    seen, there = history.last("tokens"), number(history.start.get("train_tokens"))
    if math.isfinite(seen):
        share = seen / there if there > 0 else math.nan
        passes = (
            f"{share:,.{1 if share < 100 else 0}f} passes over {compact(there)}"
            if share >= 1
            else f"{share * 100:.2g} % of the training data"
        )
        yield "Tokens seen", compact(seen), passes if there > 0 else ""


def _speed_tiles(history: History) -> Iterable[tuple[str, str, str]]:
    speed, mfu, seconds = (history.median(name) for name in ("tokens_per_second", "mfu", "seconds"))
    peak = number(history.start.get("peak_flops"))
    if math.isfinite(speed):
        yield "Tokens per second", compact(speed), "median over the steps"
    if math.isfinite(mfu):
        unit, letter = (1e12, "T") if peak >= 1e12 else (1e9, "G")
        known = f" of a measured peak of {peak / unit:,.3g} {letter}FLOP/s" if peak > 0 else ""
        yield "Model FLOPs utilisation", f"{mfu * 100:.1f} %", f"median{known}"
    wall = history.wall or sum(value for value in history.columns["seconds"] if math.isfinite(value))
    if wall:
        yield "Wall time", duration(wall), f"{duration(seconds)} per step" if math.isfinite(seconds) else ""


def _charts(config: dict[str, Any], history: History) -> str:
    """The loss over the page's width (on a phone its narrow twin), then learning rate, gradient norm and throughput."""
    if not history.columns["step"] and not history.of_kind("eval"):
        return '<p class="empty">No training steps are recorded yet.</p>\n'
    wide, narrow = (_loss_chart(history, width, height) for width, height in ((1000, 400), (340, 280)))
    small = "".join(f"<figure>{chart}</figure>" for chart in _small_charts(config, history))
    figures = f'<figure class="wide">{wide}</figure><figure class="narrow">{narrow}</figure>'
    return f'<section>{figures}<div class="row">{small}</div></section>\n'


def _loss_chart(history: History, width: int, height: int) -> str:
    steps, losses = history.columns["step"], history.columns["loss"]
    evals, bigram = history.of_kind("eval"), _bigram(history)
    held_out = Series("held-out", [_step(event) for event in evals], [number(event.get("loss")) for event in evals], 2, "dots")
    curves = [*_smoothed("training", steps, losses), *([held_out] if evals else [])]
    rules = [Rule(f"bigram model {number(bigram['loss']):.3f}", number(bigram["loss"]))] if bigram else []
    seen = [loss for loss in losses if loss > 0]
    log = bool(seen) and max(seen) > 3 * min(seen)
    chart = partial(line_chart, curves, title="Loss", x_label="step", x_note=partial(_tooltip, history), rules=rules, log_y=log)
    return chart(y_label="nats per token, logarithmic" if log else "nats per token", width=width, height=height)


def _small_charts(config: dict[str, Any], history: History) -> list[str]:
    steps, norms = history.columns["step"], history.columns["grad_norm"]
    if not steps:
        return []
    chart = partial(line_chart, x_label="step", width=320, height=210, x_note=partial(_tooltip, history))
    known, clip = [norm for norm in norms if norm > 0], number(config.get("optim.clip"))
    rules = [Rule(f"clipped at {clip:g}", clip)] if clip > 0 else []
    log = bool(known) and max(known) > 30 * min(known)
    rate, speed = Series("learning rate", steps, history.columns["lr"]), _smoothed("", steps, history.columns["tokens_per_second"])
    return [
        chart([rate], title="Learning rate", y_label="", from_zero=True),
        chart(_smoothed("", steps, norms), title="Gradient norm", y_label="", log_y=log, rules=rules),
        chart(speed, title="Throughput", y_label="tokens per second", from_zero=True),
    ]


def _tooltip(history: History, step: float) -> str:
    place = bisect.bisect_right(history.columns["step"], step) - 1
    tokens = history.columns["tokens"][place] if place >= 0 else math.nan
    return f"step {step:,.0f}" + (f", {tokens:,.0f} tokens" if math.isfinite(tokens) else "")


def _smoothed(name: str, x: Sequence[float], y: Sequence[float]) -> list[Series]:
    """A curve as it is, faint, and its moving mean; short curves as they are."""
    if len(x) < 100:
        return [Series(name or "each step", x, y)] if x else []
    places, means, window = smooth(x, y)
    name = f"{name}, " if name else ""
    return [Series(f"{name}each step", x, y, form="faint"), Series(f"{name}mean of {window:,} steps", places, means)]


def _samples(samples: list[Event]) -> str:
    """What the model wrote: the newest open, earlier ones folded."""
    if not samples:
        return ""
    newest = [event for event in samples if _step(event) == _step(samples[-1])]
    earlier = samples[: -len(newest)][::-1]
    spread = earlier[:: max(1, math.ceil(len(earlier) / SAMPLES_SHOWN))]
    shown = f"{len(spread):,} of {len(earlier):,} earlier samples" if len(spread) < len(earlier) else "Earlier samples"
    folded = f"<details><summary>{shown}</summary>{''.join(map(_sample, spread))}</details>" if earlier else ""
    return f"<section><h2>What it writes</h2>{''.join(map(_sample, newest[:SAMPLES_SHOWN]))}{folded}</section>\n"


def _sample(event: Event) -> str:
    prompt, text = str(event.get("prompt") or ""), str(event.get("text") or "")
    written = text.removeprefix(prompt)
    return f"<figure><pre><b>{_visible(prompt)}</b>{_visible(written)}</pre><figcaption>step {_step(event):,.0f}</figcaption></figure>"


def _visible(text: str) -> str:
    """Escaped text whose control characters, which HTML forbids, are shown by their Unicode pictures."""
    return escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


def _commands(run: Path, config: dict[str, Any], history: History) -> str:
    samples = history.of_kind("sample")
    prompt = str(samples[-1].get("prompt") or "") if samples else ""
    goal, step = number(config.get("train.steps")), history.last("step")
    steps = 2 * step if step >= goal else goal
    place = shlex.quote(str(run))
    commands = [
        ("Write with it", f"teratron generate {place} {shlex.quote(prompt or 'Once upon a time')}"),
        (
            "Train it further",
            f"teratron train {shlex.quote(str(run / 'config.toml'))} --run {place} --train.steps {steps:.0f}" if steps > 0 else "",
        ),
        ("Watch and compare curves", f"tensorboard --logdir {shlex.quote(str(run / 'tensorboard'))}"),
    ]
    listed = "".join(f"<dt>{title}</dt><dd><code>{_visible(command)}</code></dd>" for title, command in commands if command)
    return f'<section><h2>To try next</h2><dl class="commands">{listed}</dl></section>\n'


def _config(config: dict[str, Any]) -> str:
    """The keys that differ from the defaults, then all of them, folded."""
    if not config:
        return ""
    parts: dict[str, Any] = {part.name: type(getattr(Config(), part.name)) for part in dataclasses.fields(Config)}
    meanings = {f"{name}.{key}": text for name, part in parts.items() for key, text in field_docs(part).items()}
    defaults = {name: _value(value) for name, value in Config().items()}
    changed, rows = [], []
    for name, value in config.items():
        text, differs = _value(value), _value(value) != defaults.get(name)
        meaning = meanings.get(name, "") + (f" Default: {defaults[name] or 'empty'}." if differs and name in defaults else "")
        cells = f'<th scope="row">{escape(name)}</th><td><code>{escape(text)}</code></td><td>{escape(meaning)}</td>'
        rows.append(f'<tr class="changed">{cells}</tr>' if differs else f"<tr>{cells}</tr>")
        changed += rows[-1:] if differs else []
    folded = f"<details><summary>All {len(rows)} keys</summary><table>{''.join(rows)}</table></details>"
    summary = f"{len(changed)} key{'s differ' if len(changed) != 1 else ' differs'} from the defaults"
    unfolded = f"<details open><summary>{summary}</summary><table>{''.join(changed)}</table></details>"
    return f"<section><h2>Config</h2>{unfolded if changed else ''}{folded}</section>\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _events(events: list[Event]) -> str:
    """Everything that happened besides steps."""
    if not events:
        return ""
    cells = ((str(event["event"]), f"{_step(event):,.0f}", _when(event), _details(event)) for event in events[-EVENTS_SHOWN:])
    rows = "".join(
        f'<tr><th scope="row">{escape(kind)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>' for kind, *rest in cells
    )
    title = f"The last {EVENTS_SHOWN} of {len(events):,} events" if len(events) > EVENTS_SHOWN else f"All {len(events)} events"
    head = "<tr><th>event</th><th>step</th><th>time</th><th></th></tr>"
    return f"<section><h2>Events</h2><details><summary>{title}</summary><table>{head}{rows}</table></details></section>\n"


def _details(event: Event) -> str:
    """An event's own fields on one short line."""
    skipped = ("event", "step", "time", "text", "versions")
    fields = {key: value for key, value in event.items() if key not in skipped and value is not None and value == value}
    return ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else str(value)[:80]}" for key, value in fields.items())


def _when(event: Event) -> str:
    time = number(event.get("time"))
    if not 0 <= time < 1e11:
        return ""
    moment = datetime.fromtimestamp(time, UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


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
section > figure + figure, details > figure { margin-top: 12px; }
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
