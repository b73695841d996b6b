"""A run's report: one self-contained HTML page made of nothing but the run's config.toml and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from teratron.config import Config, UserError
from teratron.config.keys import field_docs
from teratron.train import charts
from teratron.train.history import BEGINNINGS, Event, History, number, perplexity_of, read_config, read_history, step_of
from teratron.train.report_curves import bigram_of, curves
from teratron.train.report_norms import norm_map
from teratron.train.report_page import PAGE, STYLE, compact, details, duration, visible, when

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


def _page(run: Path, config: dict[str, Any], history: History) -> str:
    name = escape(run.resolve().name)
    main = "".join(
        [
            _header(name, config, history),
            _tiles(history),
            curves(config, history),
            norm_map(history),
            _samples(history.of_kind("sample")),
            _commands(run, config, history),
            _config(config),
            _events(history.events),
        ]
    )
    return PAGE.format(title=name, style=STYLE + charts.STYLE, main=main)


def _header(name: str, config: dict[str, Any], history: History) -> str:
    """State, title, where and when it ran, and what a reader must know before trusting the numbers."""
    step, goal = history.last("step"), number(config.get("train.steps"))
    ends = [event for event in history.events if event["event"] in (*BEGINNINGS, "end")]
    reason = str(ends[-1].get("reason")) if ends else ""
    state = {"done": "finished", "interrupted": "interrupted", "preempted": "preempted"}.get(reason, "not finished")
    target = f" of {goal:,.0f}" if math.isfinite(goal) and goal != step else ""
    progress = f" · step {step:,.0f}{target}" if math.isfinite(step) else ""
    versions = history.start.get("versions")
    facts = [
        f"started {when(history.start)}" if when(history.start) else "",
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
        if "perplexity" in best:
            yield "Held-out perplexity", f"{perplexity_of(best):,.2f}", _against_bigram(history, perplexity_of(best))
        at = f"at step {step_of(best):,.0f}"
        yield "Held-out loss", f"{best['loss']:.3f}", at if best is last else f"best, {at}; last {last['loss']:.3f}"
    loss, count = history.columns["loss"], len(history.columns["loss"]) // 50
    if math.isfinite(history.last("loss")):
        recent = [value for value in loss[-count:] if math.isfinite(value)] if count > 1 else []
        yield (
            "Training loss",
            f"{loss[-1]:.3f}",
            f"last step; mean of the last {count:,}: {statistics.fmean(recent):.3f}" if recent else "last step",
        )


def _against_bigram(history: History, perplexity: float) -> str:
    bigram = bigram_of(history)
    if bigram is None:
        return ""
    ratio = perplexity_of(bigram) / perplexity
    return f"{max(ratio, 1 / ratio):,.1f} times {'lower' if ratio >= 1 else 'higher'} than a bigram model's {perplexity_of(bigram):,.2f}"


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
    if math.isfinite(history.goodput) and history.columns["seconds"]:
        yield "Goodput", f"{history.goodput * 100:.1f} %", _where_the_rest_went(history)


def _where_the_rest_went(history: History) -> str:
    """What took time and made no step that counts, as shares of the elapsed time."""
    spent = {
        "lost steps": history.lost,
        "down": history.down,
        "saving": history.total("save", "stall"),
        "evaluating": history.total("eval", "seconds"),
    }
    shares = {name: seconds / history.elapsed * 100 for name, seconds in spent.items()}
    shares["other"] = max(0.0, 100 - history.goodput * 100 - sum(shares.values()))
    return ", ".join(f"{name} {share:.1f} %" for name, share in shares.items() if share >= 0.05)


def _samples(samples: list[Event]) -> str:
    """What the model wrote: the newest open, earlier ones folded."""
    if not samples:
        return ""
    newest = [event for event in samples if step_of(event) == step_of(samples[-1])]
    earlier = samples[: -len(newest)][::-1]
    spread = earlier[:: max(1, math.ceil(len(earlier) / SAMPLES_SHOWN))]
    shown = f"{len(spread):,} of {len(earlier):,} earlier samples" if len(spread) < len(earlier) else "Earlier samples"
    folded = f"<details><summary>{shown}</summary>{''.join(map(_sample, spread))}</details>" if earlier else ""
    return f"<section><h2>What it writes</h2>{''.join(map(_sample, newest[:SAMPLES_SHOWN]))}{folded}</section>\n"


def _sample(event: Event) -> str:
    prompt, text = str(event.get("prompt") or ""), str(event.get("text") or "")
    written = text.removeprefix(prompt)
    return f"<figure><pre><b>{visible(prompt)}</b>{visible(written)}</pre><figcaption>step {step_of(event):,.0f}</figcaption></figure>"


def _commands(run: Path, config: dict[str, Any], history: History) -> str:
    samples = history.of_kind("sample")
    prompt = str(samples[-1].get("prompt") or "") if samples else ""
    goal, step = number(config.get("train.steps")), history.last("step")
    steps = 2 * step if step >= goal else goal
    place = shlex.quote(str(run))
    writes = config.get("model.family", "gpt") == "gpt" and config.get("model.head", "language") == "language"
    commands = [
        ("Write with it", f"teratron generate {place} {shlex.quote(prompt or 'Once upon a time')}" if writes else ""),
        (
            "Train it further",
            f"teratron train {shlex.quote(str(run / 'config.toml'))} --run {place} --train.steps {steps:.0f}" if steps > 0 else "",
        ),
        ("Watch and compare curves", f"tensorboard --logdir {shlex.quote(str(run / 'tensorboard'))}"),
    ]
    listed = "".join(f"<dt>{title}</dt><dd><code>{visible(command)}</code></dd>" for title, command in commands if command)
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
    cells = ((str(event["event"]), f"{step_of(event):,.0f}", when(event), details(event)) for event in events[-EVENTS_SHOWN:])
    rows = "".join(
        f'<tr><th scope="row">{escape(kind)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>' for kind, *rest in cells
    )
    title = f"The last {EVENTS_SHOWN} of {len(events):,} events" if len(events) > EVENTS_SHOWN else f"All {len(events)} events"
    head = "<tr><th>event</th><th>step</th><th>time</th><th></th></tr>"
    return f"<section><h2>Events</h2><details><summary>{title}</summary><table>{head}{rows}</table></details></section>\n"
