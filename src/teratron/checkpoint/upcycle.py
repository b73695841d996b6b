"""Upcycling: a dense model's feed-forward layers become the experts of a mixture (Komatsuzaki et al. 2023), ready to be trained on.

Every expert begins as a copy, the router anew. A token's gates add up to 1, so the mixture first computes what the dense model did.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.config import Config, UserError
from teratron.models import build_model, initial_values, parts_of

_FEED_FORWARD = re.compile(r"(blocks\.\d+\.ffn)\.(gate|up|down)\.weight")


def upcycle(weights: Weights, experts: int, experts_per_token: int) -> Weights:
    """Weights with so many experts in every block. Raises `UserError` for a model that has no dense twin."""
    config, model = weights.run_config(), weights.config
    _check(config, experts, experts_per_token)
    keys = {"experts": experts, "experts_per_token": experts_per_token, "expert_ffn": model.ffn_width, "normalise_gates": True}
    changed = config.override({f"model.{name}": value for name, value in keys.items()})
    parts = [*(_copied(entry, experts) for entry in weights.parts), *_routers(changed, weights.parts[0].dtype)]
    return replace(weights, config=changed.model, run=changed, parts=parts)


def _check(config: Config, experts: int, experts_per_token: int) -> None:
    model = config.model
    if model.experts:
        raise UserError(f"--upcycle {experts}: the model has model.experts = {model.experts} already: give a dense one")
    if model.bias:
        raise UserError(f"--upcycle {experts}: the model has model.bias = true, experts have no biases: give one without")
    if model.family not in ("gpt", "encoder"):
        raise UserError(f"--upcycle {experts}: the model has model.family = {model.family}: expected gpt or encoder")
    if not 2 <= experts_per_token <= experts:
        raise UserError(f"--experts-per-token {experts_per_token}: expected from 2 to the {experts} of --upcycle")


def _copied(entry: Entry, experts: int) -> Entry:
    found = _FEED_FORWARD.fullmatch(entry.name)
    if found is None:
        return entry
    values = entry.values

    def copies() -> Tensor:
        dense = values()
        return dense.unsqueeze(0).expand(experts, *dense.shape).contiguous()

    return Entry(f"{found[1]}.experts.{found[2]}.weight", entry.dtype, (experts, *entry.shape), copies)


def _routers(config: Config, dtype: torch.dtype) -> Iterator[Entry]:
    """What the mixture has and the dense model has not, as a new run draws it."""
    for part in parts_of(build_model(config.model, device="meta")):
        if part.name.endswith("ffn.router.weight"):
            yield Entry(part.name, dtype, part.shape, partial(initial_values, part, config.train.seed, part.box()))
