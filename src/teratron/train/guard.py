"""Bad numbers: steps that are not finite, and state that has been corrupted silently; who is to blame, and whether a run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from teratron.config import UserError
from teratron.objectives import Batch
from teratron.optim import LossScale
from teratron.train.engine import Engine
from teratron.train.metrics import Metrics, Silence
from teratron.train.replicas import Difference, compare_copies, repeat_step
from teratron.train.trace import locate

SKIPS_ALLOWED = 10
"""Updates in a row that may be skipped for a gradient that is not finite."""
KEPT = "stopped without saving, earlier checkpoints are intact"
ADVICE = {
    "reproducible": "lower optim.lr or model.init_std, and start again or --fork from the newest checkpoint, or leave single updates out "
    "with --train.on_bad_numbers skip",
    "overflow": "start again or --fork from the newest checkpoint with a lower optim.loss_scale, or 0 to have it adjusted",
    "transient": "run the same command again, and watch that machine",
}
"""What to do about each kind of fault."""


class Guard:
    """Looks at every step of a run once it is made. All ranks ask it the same, and raise the same `UserError`."""

    def __init__(self, run: Path, engine: Engine, say: Callable[[str], None]) -> None:
        self.run, self.config, self.engine, self._say = run, engine.config, engine, say
        self._skipped = 0
        """Updates in a row that were skipped for no cure."""
        self._overflowed = 0
        """The first of the steps in a row that a smaller loss scale cures; 0 = the last step was none."""
        self._verified = 0
        """The last step after which the copies were the same."""

    def check(self, step: int, batch: Batch, loss: float, norm: float, scale: LossScale, metrics: Metrics | Silence) -> None:
        """After a step, with this rank's batch and the loss scale that it had. Raises `UserError` where the run must not go on."""
        if math.isfinite(norm) and math.isfinite(loss):
            self.tell_overflows(step - 1, scale.scale)
            self._skipped = 0
        elif self._is_cured(loss, scale):
            self._overflowed = self._overflowed or step
        else:
            self.tell_overflows(step - 1, scale.scale)
            self._judge(step, batch, loss, norm, scale, metrics)
        if self.config.train.verify_every and step % self.config.train.verify_every == 0:
            self._verify(step, batch, scale, metrics)

    def tell_overflows(self, last: int, scale: float) -> None:
        """One line for steps in a row, the last of which is told; `metrics.jsonl` has each."""
        if self._overflowed:
            steps = f"steps {self._overflowed} to {last}" if last > self._overflowed else f"step {last}"
            self._say(f"{steps}: overflow in fp16: no update; loss scale now {scale:g}")
            self._overflowed = 0

    def _is_cured(self, loss: float, scale: LossScale) -> bool:
        """Whether a smaller loss scale is still to come; it cures gradients alone, never the loss, which it does not enter."""
        optim = self.config.optim
        adjusted = self.config.train.precision == "fp16" and not optim.loss_scale
        return adjusted and math.isfinite(loss) and scale.scale > optim.min_loss_scale

    def _judge(self, step: int, batch: Batch, loss: float, norm: float, scale: LossScale, metrics: Metrics | Silence) -> None:
        """Numbers that nothing here cures: find where they come from, then stop or go on."""
        found = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        place, fault = self._cause(step, batch, scale)
        metrics.write("bad_numbers", step=step, loss=loss, grad_norm=norm, place=place, fault=fault, time=time.time())
        self._skipped += 1
        if self.config.train.on_bad_numbers == "skip" and not math.isfinite(norm) and self._skipped < SKIPS_ALLOWED:
            self._say(f"step {step}: {found}: the update was skipped; {place}")
            return
        more = f"; {self._skipped} updates in a row were skipped" if self._skipped > 1 else ""
        raise UserError(f"{self.run}: step {step}: {found}; {place}{more}: {KEPT}; {ADVICE[fault]}")

    def _cause(self, step: int, batch: Batch, scale: LossScale) -> tuple[str, str]:
        """Where the numbers come from in words, and which kind of fault it is.

        The update was skipped and a step is a function of the state, so it can be made again: here with the least loss scale.
        """
        least = min(scale.scale, self.config.optim.min_loss_scale)
        place = locate(self.engine, batch, step, least)
        if place:
            return f"first not finite: {place}, in the step made again as well", "reproducible"
        if least < scale.scale:
            return f"with loss scale {least:g} in place of {scale.scale:g} it is finite: an overflow", "overflow"
        return "the same step made again is finite: a transient fault, so suspect the hardware", "transient"

    def _verify(self, step: int, batch: Batch, scale: LossScale, metrics: Metrics | Silence) -> None:
        """Compare what several ranks hold; where there is but one rank, compute the step twice instead."""
        difference = compare_copies(self.engine) if self.engine.mesh.world > 1 else None
        if difference is None and self.engine.mesh.world > 1:
            self._verified = step
            return
        ranks = repeat_step(self.engine, batch, step, scale.scale)
        if difference is None and not ranks:
            return
        since = f" since step {self._verified}" if self._verified else ""
        words = [_different(difference, since)] if difference is not None else []
        words.append(_repeated(ranks))
        told = difference.ranks if difference is not None else tuple(ranks)
        fault = "transient" if ranks else "not seen again"
        metrics.write("corruption", step=step, ranks=list(told), fault=fault, since=self._verified, time=time.time())
        raise UserError(
            f"{self.run}: step {step}: {'; '.join(words)}: {KEPT}; remove checkpoints that you do not trust, take that machine out, and "
            "run the same command again"
        )


def _ranks(ranks: tuple[int, ...] | list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _different(difference: Difference, since: str) -> str:
    """Such as: rank 2 holds other bits than its copies, changed since step 40: weight/..."""
    who = _ranks(difference.ranks)
    verdict = f"{who} outvoted by the copies elsewhere" if difference.outvoted else f"{who} differ, and which is wrong cannot be told"
    first, more = difference.names[0], len(difference.names) - 1
    return f"copies of {first}{f' and {more} more' if more else ''} are not the same{since}: {verdict}"


def _repeated(ranks: list[int]) -> str:
    if ranks:
        return f"the same step computed twice differs on {_ranks(ranks)}: a transient fault of the processor or memory"
    return "the same step computed twice is the same on every rank: no fault that comes and goes, the change itself is what is left of one"
