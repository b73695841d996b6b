"""A training run's checkpoints: the ranks' pieces of its state in and out, whatever the layout; old checkpoints removed."""

from __future__ import annotations

import shutil
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from teratron.checkpoint.agree import ALONE, agree, gather_json
from teratron.checkpoint.format import tensor_file, write_checkpoint
from teratron.checkpoint.machines import Machines
from teratron.checkpoint.reader import Checkpoint, checkpoint_folders, folder_step, open_checkpoint
from teratron.checkpoint.tensors import fill_pieces
from teratron.config import CheckpointConfig, Config, UserError
from teratron.optim import LossScale
from teratron.parallel.boxes import Piece
from teratron.parallel.mesh import Group


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
    skipped: int = 0
    """Steps whose update was skipped, since their gradient was not finite."""
    loss_scale: LossScale | None = None
    """Of fp16; None = as a run begins."""
    left_out: tuple[int, ...] = ()
    """Steps, ascending, whose batches are not learnt from, since the loss spiked there; these may lie ahead."""
    losses: tuple[float, ...] = ()
    """The last ones, by which a spike is known; none where nobody looks for it."""
    live: tuple[tuple[int, str, float], ...] = ()
    """What was changed on the way: (first step, what, its value), by first step; these may lie ahead."""
    noise: tuple[float, ...] = ()
    """Smoothed signal and variance of the gradient, as `log.noise_scale` has measured them; none before."""
    best: tuple[float, ...] = ()
    """The best evaluation's score, greater being better, and its step, where `train.patience` asks for it; none before the first."""


def save_training(
    run: Path,
    config: Config,
    pieces: Iterable[Piece],
    state: TrainingState,
    extra: Iterable[Path] = (),
    group: Group = ALONE,
    layout: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    machines: Machines | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNNNN`, read it back, then remove those beyond `checkpoint.keep`; a collective. Returns the folder.

    Args: pieces are what this rank holds of the training state; extra are small files or folders that travel with it, such as
    the tokenizer; layout and data are JSON that say how the model was cut, for `teratron inspect`, and what was learned from; machines
    as `write_checkpoint` takes them. Raises the same `UserError` on all ranks when it cannot be written.
    """
    machines = machines or Machines(group.rank, group.size, group.size)
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    content = {"step": state.step, "state": asdict(state), "config": tomllib.loads(config.to_toml()), "time": time.time()}
    content["layout"] = dict(layout) if layout is not None else {"ranks": group.size}
    if data is not None:
        content["data"] = dict(data)
    write_checkpoint(folder, pieces, content, extra, group, machines)
    agree(group, lambda: _verify(folder, machines))
    agree(group, lambda: remove_old(run, state, config.checkpoint) if machines.leads else None)
    return folder


def _verify(folder: Path, machines: Machines) -> None:
    """This rank's share of reading back what lies on its machine."""
    checkpoint = open_checkpoint(folder)
    elsewhere = {tensor_file(rank) for rank in machines.elsewhere()}
    checkpoint.verify(machines.share(checkpoint.manifest["files"].keys() - elsewhere))


def surplus(steps: Sequence[int], newest: TrainingState, config: CheckpointConfig) -> list[int]:
    """Of the steps of checkpoints, newest first, those that may go once that of state `newest` is verified."""
    # A later one is damaged and was passed over: it must not push out a good one.
    older = [step for step in steps if step <= newest.step][config.keep :] if config.keep else []
    return [step for step in older if step not in newest.best[1:] and (not config.keep_every or step % config.keep_every)]


def remove_old(run: Path, newest: TrainingState, config: CheckpointConfig) -> None:
    """Remove the checkpoints that may go once that of state `newest` is verified; raises `UserError` where one cannot be."""
    folders = {folder_step(folder.name) or 0: folder for folder in checkpoint_folders(run)}
    for step in surplus(list(folders), newest, config):
        _remove(folders[step])


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
        found = saved.get("loss_scale")
        scale = LossScale(float(found["scale"]), int(found["clean"]), int(found["overflows"])) if found else None
        left_out, losses = tuple(map(int, saved.get("left_out", ()))), tuple(map(float, saved.get("losses", ())))
        counts = int(saved["step"]), int(saved["tokens"]), float(saved["seconds"]), phases, int(saved.get("skipped", 0))
        live = tuple((int(step), str(name), float(value)) for step, name, value in saved.get("live", ()))
        return TrainingState(
            *counts, scale, left_out, losses, live, *(tuple(map(float, saved.get(name, ()))) for name in ("noise", "best"))
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{checkpoint.folder}/manifest.json: holds no state of a training run: it can be used, not trained on") from None


def check_data(checkpoint: Checkpoint, config: Config, data: Mapping[str, Any]) -> None:
    """Refuse to go on with other tokens than before, unless other `data.*` keys of a branch say so.

    data: as `save_training` was given. Checkpoints of older releases say nothing of it.
    """
    before = checkpoint.manifest.get("data")
    if not isinstance(before, dict) or replace(checkpoint.config().data, workers=0) != replace(config.data, workers=0):
        return
    for name in sorted(before.keys() | data.keys()):
        if before.get(name) != data.get(name):
            found, expected = data.get(name, "nothing"), before.get(name, "nothing")
            raise UserError(
                f"{name}: changed since {checkpoint.folder} was made: found {found}, expected {expected}: put the former data back, or "
                "branch off with --fork NEWDIR and other data.* keys"
            )


def load_training(checkpoint: Checkpoint, pieces: Iterable[Piece], group: Group = ALONE) -> None:
    """Fill every rank's pieces, however the checkpoint's were cut; a collective. What no piece covers is left as it is.

    Raises the same `UserError` on all ranks, naming the part, when the checkpoint is damaged or belongs to another model or
    optimizer; what was filled until then is of no use.
    """
    mine = list(pieces)
    wanted: dict[str, list[int]] = {}
    for names in gather_json(group, {piece.name: list(piece.shape) for piece in mine}):
        wanted |= names
    _check_kinds(checkpoint, wanted)
    _check_parts(checkpoint, wanted)
    agree(group, lambda: fill_pieces(checkpoint.folder, checkpoint.tensors, mine))


def _check_kinds(checkpoint: Checkpoint, wanted: Iterable[str]) -> None:
    """Refuse the state of another optimizer."""
    needed, held = ({name.partition("/")[0] for name in names} for names in (wanted, checkpoint.tensors))
    if needed != held:
        found, expected = (", ".join(sorted(kinds)) for kinds in (held, needed))
        raise UserError(f"{checkpoint.folder}: holds the state {found}, the optimizer needs {expected}: optim.name differs")


def _check_parts(checkpoint: Checkpoint, wanted: Mapping[str, list[int]]) -> None:
    """Refuse another model."""
    for name, shape in wanted.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None or list(tensor.shape) != shape:
            found = "nothing" if tensor is None else list(tensor.shape)
            raise UserError(f"{checkpoint.folder}: {name}: found {found}, the model has {shape}: model.* differs")
    surplus = next((name for name in checkpoint.tensors if name not in wanted), None)
    if surplus is not None:
        raise UserError(f"{checkpoint.folder}: holds {surplus}, which the model lacks: model.* differs")
