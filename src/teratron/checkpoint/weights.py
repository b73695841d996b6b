"""Weights that a run begins with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from teratron.checkpoint.adapters import merged
from teratron.checkpoint.exchange import open_weights
from teratron.checkpoint.stream import Entry
from teratron.config import ModelConfig, UserError
from teratron.config.meaning import meaning
from teratron.models import build_model, parts_of
from teratron.models.parts import check_parts

HEAD_KEYS = ("head", "classes", "class_bias", "head_transform", "pooler", "tie_embeddings")
"""Of `model.*`: what may differ too where the run has another head than made the weights."""
ADAPTER_KEYS = ("adapter_rank", "adapter_alpha", "adapter_targets", "adapter_dora")
NEW = re.compile(r"head\.classes\..*|.*\.(lora_a|lora_b|magnitude)")
"""Parts that a run may have and the weights that it begins with not."""
LEFT = re.compile(r"head\.(transform|transform_norm|output|pooler|sentence|classes)\..*")
"""Parts that a run with another head leaves behind."""


def weights_for(path: Path, model: ModelConfig) -> tuple[Mapping[str, Entry], tuple[str, ...]]:
    """What a run of this model begins with, from anything that `open_weights` opens: weights by part, read when asked for; and new parts.

    New are adapters and a head of classes that the weights have not. A head that the run has not is left behind; other adapters than its
    own are merged into the weights. Raises `UserError` where there are no weights, and where a key says that they belong to another model.
    """
    if not path.exists():
        raise UserError(
            f"train.init = {path}: no such file or folder: give a run, a checkpoint, a file of `teratron convert` or a Hugging Face folder"
        )
    weights = open_weights(path)
    if _differ(weights.config, model, ADAPTER_KEYS):
        weights = merged(weights)
    another = _differ(weights.config, model, HEAD_KEYS[:2])
    _check_keys(path, weights.config, model, ("router_balance", "recurrence", *ADAPTER_KEYS, *(HEAD_KEYS if another else ())))
    parts = parts_of(build_model(model, device="meta"))
    shapes = {part.name: part.shape for part in parts}
    entries = {e.name: e for e in weights.parts if not (another and LEFT.fullmatch(e.name) and shapes.get(e.name) != tuple(e.shape))}
    new = tuple(name for name in shapes if name not in entries and NEW.fullmatch(name))
    given = [part for part in parts if part.name not in new]
    check_parts(given, {name: tuple(entry.shape) for name, entry in entries.items()})
    return entries, new


def _differ(found: ModelConfig, wanted: ModelConfig, keys: Iterable[str]) -> bool:
    return any(getattr(found, key) != getattr(wanted, key) for key in keys)


def _check_keys(path: Path, found: ModelConfig, wanted: ModelConfig, free: Iterable[str]) -> None:
    """Raise `UserError` where a key differs that is not free to."""
    ours, theirs = meaning(wanted), meaning(found)
    for key, value in ours.items():
        if key not in free and theirs.get(key, value) != value:
            raise UserError(
                f"train.init = {path}: its weights have model.{key} = {theirs[key]}, the run {value}: set --model.{key} {theirs[key]}"
            )
