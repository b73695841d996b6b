"""A training run's checkpoints: optimizer and model state in, state of a step out, old ones removed."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from teratron.checkpoint.format import write_checkpoint
from teratron.checkpoint.reader import Checkpoint, checkpoint_folders
from teratron.config import Config, UserError
from teratron.optim import AdamW


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands; everything else follows from the step (law 3)."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Time spent in training steps."""
    phases: tuple[int, ...] = ()
    """Steps of each phase of the sample order; more steps append one (contract C14)."""


def state_tensors(optimizer: AdamW) -> list[tuple[str, Tensor]]:
    """All tensors of a run's state as (`weight/PART` | `moment1/PART` | `moment2/PART`, view in master precision)."""
    return [(f"{kind}/{part.name}", view) for kind, part, view in optimizer.tensors()]


def save_training(run: Path, config: Config, optimizer: AdamW, state: TrainingState, extra: Iterable[Path] = ()) -> Path:
    """Write `checkpoints/step-NNNNNNNN` and then remove those beyond `checkpoint.keep`; returns the folder.

    extra: small files or folders that travel with it, such as the tokenizer. Raises `UserError` when it cannot be written.
    """
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    content = {"step": state.step, "state": asdict(state), "config": tomllib.loads(config.to_toml())}
    write_checkpoint(folder, state_tensors(optimizer), content, extra)
    if config.checkpoint.keep:
        folders = checkpoint_folders(run)
        # A folder of a later step is a damaged one that was passed over: it must not push out a good one.
        for old in folders[folders.index(folder) + config.checkpoint.keep :]:
            _remove(old)
    return folder


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"{folder}: this old checkpoint cannot be removed ({error.strerror or error}): remove it by hand") from None


def saved_state(checkpoint: Checkpoint) -> TrainingState:
    """Where the run stood. Raises `UserError` for a checkpoint that does not say so."""
    try:
        saved = checkpoint.manifest["state"]
        phases = tuple(int(steps) for steps in saved["phases"])
        return TrainingState(int(saved["step"]), int(saved["tokens"]), float(saved["seconds"]), phases)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{checkpoint.folder}/manifest.json: holds no state of a training run: it can be used, not trained on") from None


def load_training(checkpoint: Checkpoint, optimizer: AdamW) -> None:
    """Fill masters and moments; padding of the vocabulary becomes zero.

    Raises `UserError` naming the part when the checkpoint belongs to another model; the optimizer is then of no use.
    """
    optimizer.zero()
    stored = checkpoint.load()
    for name, view in state_tensors(optimizer):
        tensor = stored.pop(name, None)
        if tensor is None or tensor.shape != view.shape:
            found = "nothing" if tensor is None else list(tensor.shape)
            raise UserError(f"{checkpoint.folder}: {name}: found {found}, the model has {list(view.shape)}: model.* differs")
        view.copy_(tensor)
    if stored:
        raise UserError(f"{checkpoint.folder}: holds {next(iter(stored))}, which the model lacks: model.* differs")
    optimizer.publish()
