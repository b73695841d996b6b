"""Loss spikes: when a loss is one, which batches are then left out, and the checkpoint to go back to (PaLM; Chowdhery et al. 2022).

Everything here is a function of the training state, so a killed run takes the same decisions again (law 3).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from teratron.checkpoint import Checkpoint, open_checkpoint, saved_state
from teratron.checkpoint.format import discard
from teratron.checkpoint.reader import checkpoint_folders, folder_step
from teratron.config import TrainConfig, UserError

NORMAL = 1.4826
"""Standard deviations of a normal distribution in a median absolute deviation."""
LEAST = 1e-3
"""Of the median: losses that scatter less than this are taken to scatter so much."""
SPIKES_ALLOWED = 3
"""Within one window."""


def remember(losses: tuple[float, ...], loss: float, config: TrainConfig) -> tuple[float, ...]:
    """The losses that the next one is compared with."""
    return (*losses, loss)[-config.spike_window :] if config.spike_zscore else ()


def zscore(loss: float, losses: Sequence[float]) -> float:
    """How many deviations a loss lies above the median of others; the deviation is robust, from their median absolute deviation."""
    median = statistics.median(losses)
    deviation = NORMAL * statistics.median(abs(other - median) for other in losses)
    return (loss - median) / max(deviation, LEAST * abs(median), 1e-30)


def is_spike(loss: float, losses: Sequence[float], config: TrainConfig) -> bool:
    """losses: those before it; there is no spike before the window is full."""
    full = len(losses) == config.spike_window
    return bool(config.spike_zscore) and full and math.isfinite(loss) and zscore(loss, losses) > config.spike_zscore


def leave_out(left_out: Sequence[int], step: int, config: TrainConfig) -> tuple[int, ...]:
    """The steps left out once the loss of a step was a spike: as many more as `train.spike_skip` says, that step the last of them.

    Raises `UserError` when it has spiked too often within a window.
    """
    if sum(other > step - config.spike_window for other in left_out) >= SPIKES_ALLOWED * config.spike_skip:
        raise UserError(
            f"step {step}: the loss spiked again after {SPIKES_ALLOWED} returns within {config.spike_window} steps: stopped without "
            "saving, earlier checkpoints are intact; branch off with --fork NEWDIR and a lower optim.lr, or a larger train.spike_skip"
        )
    learnt = [other for other in range(step, 0, -1) if other not in left_out]
    return tuple(sorted({*left_out, *learnt[: config.spike_skip]}))


def checkpoint_before(run: Path, step: int, left_out: Sequence[int], warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint before a step that a run with these steps left out comes by; damaged ones are named and passed over.

    None when the run has saved nothing and can begin anew. Raises `UserError` when no checkpoint is of use.
    """
    folders = checkpoint_folders(run)
    for folder in folders:
        if (folder_step(folder.name) or 0) >= step:
            continue
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.verify()
            if _until(saved_state(checkpoint).left_out, checkpoint.step) == _until(left_out, checkpoint.step):
                return checkpoint
        except UserError as error:
            warn(f"skipped a damaged checkpoint: {error}")
    if folders:
        raise UserError(
            f"{run}: the loss spiked, and no good checkpoint lies before step {step}, the first to be left out: "
            "branch off with --fork NEWDIR and a larger train.spike_zscore, and keep more with checkpoint.keep"
        )
    return None


def remove_given_up(run: Path, step: int) -> None:
    """Remove the checkpoints from a step on: the run has gone back to before it, and they would count among those that it keeps."""
    for folder in checkpoint_folders(run):
        if (folder_step(folder.name) or 0) >= step:
            discard(folder)


def _until(steps: Sequence[int], last: int) -> list[int]:
    return [step for step in steps if step <= last]
