"""Models: leaf modules, families as ordered units with their plans, parts and their initial values."""

from __future__ import annotations

import torch

from teratron.config import ModelConfig, UserError
from teratron.models.adapters import adapt
from teratron.models.encoder_decoder import EncoderDecoder
from teratron.models.gpt import GPT, Encoder
from teratron.models.leaves import Part
from teratron.models.parts import flops_per_token, initial_values, initialise, load_parts, parameter_count, parts_of
from teratron.models.units import Model, State, with_dropout
from teratron.models.xlnet import XLNet

__all__ = [
    "GPT",
    "Encoder",
    "EncoderDecoder",
    "Model",
    "Part",
    "State",
    "XLNet",
    "build_model",
    "flops_per_token",
    "initial_values",
    "initialise",
    "load_parts",
    "parameter_count",
    "parts_of",
    "with_dropout",
]

FAMILIES: dict[str, type[GPT] | type[EncoderDecoder] | type[XLNet]] = {
    "gpt": GPT,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
    "xlnet": XLNet,
}


def build_model(
    config: ModelConfig, units: range | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """A model, or a range of its units, with uninitialised parameters (on `meta`: without memory)."""
    if config.vocab_size == 0:
        raise UserError("model.vocab_size = 0: give it, or train from data whose tokenizer has a size")
    with torch.device(device):
        model = FAMILIES[config.family](config, units)
        if config.adapter_rank:
            adapt(model, config)
        return model.to(dtype)
