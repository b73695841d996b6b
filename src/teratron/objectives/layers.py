"""What layers add to any objective: the routers' loss terms and choices, which they leave in the state of their stage (contract C2)."""

from __future__ import annotations

import torch
from torch import Tensor

from teratron.models import Model, State
from teratron.models.units import LOAD, TERM, real_tokens
from teratron.objectives.terms import Batch, Term

LAYER_TERMS = frozenset({"aux_loss", "z_loss"})
"""Their names."""


def layer_counts(model: Model, batch: Batch) -> dict[str, Tensor]:
    """The denominators of the layers' terms: sequences for the auxiliary loss, real tokens of all streams for the z-loss."""
    config = model.config
    streams = [stream for stream in model.streams if f"{stream}positions" in batch]
    counts = {}
    if config.experts and config.router_balance == "aux":
        counts["aux_loss"] = torch.tensor(float(len(batch[f"{streams[0]}positions"])), dtype=torch.float64)
    if config.experts and config.z_loss:
        found = [(real_tokens(batch, stream), batch[f"{stream}positions"]) for stream in streams]
        tokens = [real.sum(dtype=torch.float64) if real is not None else float(every.numel()) for real, every in found]
        counts["z_loss"] = torch.as_tensor(sum(tokens), dtype=torch.float64)
    return {name: count.to(batch[f"{streams[0]}positions"].device) for name, count in counts.items()}


def layer_terms(model: Model, state: State, training: bool = True) -> list[Term]:
    """The terms that this stage's layers left in the last state; outside training they are told but weigh nothing."""
    weights = {"aux_loss": model.config.aux_loss, "z_loss": model.config.z_loss}
    found = {name.removeprefix(TERM): value for name, value in state.items() if name.startswith(TERM)}
    return [Term(name, value, weights[name] if training else 0.0) for name, value in found.items()]


def layer_loads(state: State) -> dict[str, Tensor]:
    """How many tokens of a micro-batch chose each expert, float64 [E], by the router's path."""
    return {name.removeprefix(LOAD): load.double() for name, load in state.items() if name.startswith(LOAD)}
