"""Models: leaf modules, families as ordered units, parts and their initial values."""

from __future__ import annotations

import torch

from teratron.config import ModelConfig, UserError
from teratron.models.gpt import GPT, State
from teratron.models.leaves import Part
from teratron.models.parts import flops_per_token, initialise, load_parts, parameter_count, parts_of

__all__ = ["GPT", "Part", "State", "build_model", "flops_per_token", "initialise", "load_parts", "parameter_count", "parts_of"]


def build_model(
    config: ModelConfig, units: range | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> GPT:
    """A model, or a range of its units, with uninitialised parameters (on `meta`: without memory)."""
    if config.vocab_size == 0:
        raise UserError("model.vocab_size = 0: give it, or train from data whose tokenizer has a size")
    with torch.device(device):
        return GPT(config, units).to(dtype)
