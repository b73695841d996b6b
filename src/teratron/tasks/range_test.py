"""The learning-rate range test (Smith 2017): one short run whose learning rate rises exponentially, until the loss diverges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from teratron.checkpoint.format import write_synced
from teratron.config import Config, UserError, frozen_changes
from teratron.tasks.sweep_jobs import Job, Slot, arguments_of
from teratron.train import charts
from teratron.train.charts import Lane, Series, line_chart
from teratron.train.history import Follower
from teratron.train.interrupt import Interrupt
from teratron.train.report_page import PAGE, STYLE
from teratron.train.run import absolute_paths, has_config, refuse_changes

PERIOD = 0.2
"""Seconds between two looks at the run."""
REACH = 25
"""One part in so many of the steps is averaged over on each side."""
LOST, RISEN = 0.5, 0.1
"""The loss diverges when it has lost this share of what it had gained, and has risen by this share of where it began."""
OPTIONS = {"optim.min_lr": "--from", "optim.lr": "--to", "train.steps": "--steps"}
SET = (*OPTIONS, "optim.schedule", "optim.warmup_steps", "optim.decay_shape")
"""Keys that the test itself sets, some of them by options."""


@dataclass(frozen=True)
class Finding:
    """What a range test has shown so far."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    steepest: float
    """The learning rate at which the smoothed loss falls fastest; NaN where it never falls."""
    diverged: float
    """The one from which on it is lost; NaN = it is not."""

    @property
    def suggested(self) -> float:
        """The geometric mean of the steepest descent and of a tenth of where it diverges; where one is not known, the other."""
        known = [rate for rate in (self.steepest, self.diverged / 10) if math.isfinite(rate)]
        return math.prod(known) ** (1 / len(known)) if known else math.nan


def find(rates: Sequence[float], losses: Sequence[float], steps: int) -> Finding:
    """Read the curve of the first steps of a test of so many; a loss that is not finite is divergence.

    What has diverged stays so, however many steps follow.
    """
    known, reach = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses)), max(1, steps // REACH)
    smooth = _smoothed(losses[:known], reach)
    lost = _lost(smooth[: max(0, known - reach)])  # beyond, means are of fewer losses and would change with further ones
    diverged = rates[lost] if lost is not None else rates[known] if known < len(losses) else math.nan
    best = min(range(known if lost is None else lost), key=smooth.__getitem__, default=0)
    return Finding(list(rates), list(losses), smooth, _steepest(rates, smooth, best, reach), diverged)


def _lost(smooth: Sequence[float]) -> int | None:
    """The first step that lies far above the best one before it."""
    best = math.inf
    for i, loss in enumerate(smooth):
        best = min(best, loss)
        if loss > best + max(LOST * (smooth[0] - best), RISEN * smooth[0]):
            return i
    return None


def _smoothed(losses: Sequence[float], reach: int) -> list[float]:
    """Centred means, of fewer on both sides near the ends."""
    means = []
    for i in range(len(losses)):
        half = min(reach, i, len(losses) - 1 - i)
        means.append(math.fsum(losses[i - half : i + half + 1]) / (2 * half + 1))
    return means


def _steepest(rates: Sequence[float], smooth: Sequence[float], best: int, reach: int) -> float:
    slopes = {i: smooth[i + reach] - smooth[i - reach] for i in range(reach, min(best + 1, len(smooth) - reach))}
    place = min(slopes, key=slopes.__getitem__, default=None)
    return rates[place] if place is not None and slopes[place] < 0 else math.nan


def range_config(config: Config, low: float, high: float, steps: int) -> Config:
    """The config of the run. Raises `UserError` for a range that is none."""
    if not 0 < low < high < math.inf:
        raise UserError(f"--from {low:g} --to {high:g}: expected two learning rates above 0, the lower one first")
    if steps < 2:
        raise UserError(f"--steps {steps}: expected at least 2, such as 200")
    if config.optim.name == "schedule_free":
        raise UserError("optim.name = schedule_free averages weights at one learning rate, and a range test raises it: take adamw's range")
    keys = dict(zip(SET, (low, high, steps, "range", 0, "linear"), strict=True))
    short = {"train.eval_every": 0, "train.eval_batches": 1, "checkpoint.every": 0, "train.spike_zscore": 0.0}
    return absolute_paths(config).override(keys | short)


def range_test(config: Config, folder: Path, nproc: int, device: str, say: Callable[[str], None]) -> tuple[Finding, int]:
    """Make the run in FOLDER/run, or go on with it, until it diverges or ends; also returns the exit code of a signal, or 0."""
    base, run, steps = folder.resolve() / "range.toml", folder.resolve() / "run", config.train.steps
    _check_folder(folder, base, config)
    folder.mkdir(parents=True, exist_ok=True)
    follower, code = Follower(run / "metrics.jsonl"), 0
    if not _over(_found(follower, steps), steps):
        write_synced(base, config.to_toml().encode())
        job = Job(0, run, steps, arguments_of(run, base, {}, nproc, device), Slot())
        with Interrupt() as interrupt:
            _follow(job, follower, steps, interrupt, say)
            code = interrupt.asked
        found = _found(follower, steps)
        if not code and not _over(found, steps):
            raise UserError(job.outcome(job.process.returncode, "loss").reason)
    found = _found(follower, steps)
    _write_page(folder, found)
    return found, code


def _check_folder(folder: Path, base: Path, config: Config) -> None:
    """Raise `UserError` for a folder of something else, or of a test with other keys; base: the config that it was begun with."""
    if has_config(folder):
        raise UserError(f"--run {folder}: holds a run: choose another folder for the test")
    if base.is_file():
        old = Config.load(base)
        changes = frozen_changes(old, config)
        if old.train.steps != config.train.steps:
            changes.append(("train.steps", old.train.steps, config.train.steps))
        refuse_changes(folder, "range test", [(OPTIONS.get(name, name), then, now) for name, then, now in changes])


def _follow(job: Job, follower: Follower, steps: int, interrupt: Interrupt, say: Callable[[str], None]) -> None:
    """Until the job has ended; it is asked to when the loss diverges, or by a signal."""
    told = 0
    try:
        while job.poll() is None:
            time.sleep(PERIOD)
            found = _found(follower, steps)
            if interrupt.asked or math.isfinite(found.diverged):
                job.stop()
            if len(found.rates) >= told + max(1, steps // 10):
                told = len(found.rates)
                say(f"step {told} of {steps}: learning rate {found.rates[-1]:.2e}, loss {found.losses[-1]:.4f}")
    finally:
        job.kill()


def _found(follower: Follower, steps: int) -> Finding:
    columns = follower.update().columns
    return find(columns["lr"], columns["loss"], steps)


def _over(found: Finding, steps: int) -> bool:
    return len(found.rates) >= steps or math.isfinite(found.diverged)


def _write_page(folder: Path, found: Finding) -> None:
    """Write range.html: loss over learning rate, and where it is steepest and diverges."""
    marks = {"steepest": found.steepest, "diverges": found.diverged, "suggested": found.suggested}
    lanes = [Lane(name, [rate], [f"{name}: {rate:.2e}"]) for name, rate in marks.items() if math.isfinite(rate)]
    curves = [
        Series("each step", found.rates, found.losses, form="faint"),
        Series("smoothed", found.rates[: len(found.smooth)], found.smooth),
    ]
    chart = line_chart(
        curves,
        title="Loss over learning rate",
        x_label="learning rate",
        y_label="nats per token",
        log_x=True,
        lanes=lanes,
        width=1000,
        height=420,
        x_note=lambda rate: f"learning rate {rate:.3g}",
    )
    head = f"<header><h1>Learning-rate range test</h1><p>{'; '.join(tell(found))}</p></header>"
    main = f"{head}<section><h2>Curve</h2><figure>{chart}</figure></section>"
    page = PAGE.format(title="range test", style=STYLE + charts.STYLE, main=main)
    write_synced(folder / "range.html", page.encode())


def tell(found: Finding) -> list[str]:
    """What it has shown, in words."""
    steep, lost = math.isfinite(found.steepest), math.isfinite(found.diverged)
    words = [f"the loss falls fastest at {found.steepest:.2e}" if steep else "the loss falls nowhere: lower --from"]
    words.append(f"it diverges at {found.diverged:.2e}" if lost else "it does not diverge: raise --to")
    if steep and lost:
        low, high = sorted((found.steepest, found.diverged / 10))
        words.append(
            f"suggested: {found.suggested:.2e}, in the middle between the first and a tenth of the second ({low:.2e} to {high:.2e})"
        )
    return words
