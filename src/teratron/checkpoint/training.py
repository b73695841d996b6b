"""A training run's checkpoints: optimizer and model state in, state of a step out, old ones removed."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

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


def save_training(run: Path, config: Config, optimizer: AdamW, state: TrainingState, extra: Iterable[Path] = ()) -> Path:
    """Write `checkpoints/step-NNNNNNNN` and then remove those beyond `checkpoint.keep`; returns the folder."""
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    tensors = [(f"{kind}/{part.name}", view) for kind, part, view in optimizer.tensors()]
    content = {"step": state.step, "state": asdict(state), "config": tomllib.loads(config.to_toml())}
    write_checkpoint(folder, tensors, content, extra)
    if config.checkpoint.keep:
        for old in checkpoint_folders(run)[config.checkpoint.keep :]:
            shutil.rmtree(old)
    return folder


def load_training(checkpoint: Checkpoint, optimizer: AdamW) -> TrainingState:
    """Fill masters and moments; raises `UserError` when the checkpoint belongs to another model."""
    for kind in ("weight", "moment1", "moment2"):
        stored = checkpoint.load(kind)
        for name, part, view in optimizer.tensors():
            if name != kind:
                continue
            tensor = stored.pop(part.name, None)
            if tensor is None or tensor.shape != view.shape:
                found = "nothing" if tensor is None else list(tensor.shape)
                raise UserError(f"{checkpoint.folder}: {kind} of {part.name}: found {found}, the model has {list(view.shape)}: model.* differs")
            view.copy_(tensor)
        if stored:
            raise UserError(f"{checkpoint.folder}: holds {next(iter(stored))}, which the model lacks: model.* differs")
    optimizer.publish()
    saved = checkpoint.manifest["state"]
    return TrainingState(saved["step"], saved["tokens"], saved["seconds"], tuple(saved["phases"]))
