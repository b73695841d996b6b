"""Parts: the named pieces of a model's parameters. Initialisation, optimizers, checkpoints and converters see parts only (contract C7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from teratron.config import UserError
from teratron.models.gpt import GPT
from teratron.models.leaves import Part
from teratron.models.random import normal_rows


def parts_of(model: nn.Module) -> list[Part]:
    """Every part of a model, in module order; a shared parameter appears once, under its owner."""
    found = []
    for path, module in model.named_modules():
        leaf_parts: Iterable[Part] = module.leaf_parts() if hasattr(module, "leaf_parts") else ()
        for part in leaf_parts:
            parameter = f"{path}.{part.parameter}".removeprefix(".")
            found.append(replace(part, name=_full_name(path, part.name), parameter=parameter))
    return found


def _full_name(leaf: str, name: str) -> str:
    """A part's full name from its leaf's path and `Part.name`."""
    if name.startswith("/"):
        return name[1:]
    full = leaf + name if name.startswith(".") else f"{leaf.rpartition('.')[0]}.{name}"
    return full.removeprefix(".")  # a leaf that is the root, or right below it


def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter with its initial values: a function of (seed, part name, full shape) alone (contract C8)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()  # padding of the vocabulary stays zero
        for part in parts_of(model):
            target = part.of(parameters[part.parameter])
            if part.std is None:
                target.fill_(part.fill)
            else:
                target.copy_(normal_rows(seed, part.name, part.shape, 0, part.shape[0]) * part.std)


def load_parts(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Copy parts by name into a model's parameters, in their dtype; padding of the vocabulary becomes zero.

    Raises `UserError` naming the parts that are missing, unexpected or of another shape; the model is then unchanged.
    """
    parts = {part.name: part for part in parts_of(model)}
    _check_tensors(parts, tensors)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        for name, part in parts.items():
            part.of(parameters[part.parameter]).copy_(tensors[name])


def _check_tensors(parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the parts."""
    hint = "model.* differs from what made these weights"
    missing, unexpected = [name for name in parts if name not in tensors], [name for name in tensors if name not in parts]
    for kind, names in (("missing", missing), ("not in this model", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"weights {kind}: {', '.join(names[:3])}{more}: {hint}")
    for name, part in parts.items():
        if tuple(tensors[name].shape) != part.shape:
            raise UserError(f"{name}: found shape {list(tensors[name].shape)}, expected {list(part.shape)}: {hint}")


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model without padding; works on the meta device."""
    return sum(torch.Size(part.shape).numel() for part in parts_of(model))


def flops_per_token(model: GPT, seq_length: int) -> float:
    """Floating-point operations of one token's forward and backward pass.

    6 for each weight of a matrix product (the output projection included, the embedding look-up not) and the causal half of
    the attention products, as Megatron-LM counts; recomputation is never counted.
    """
    config = model.config
    tables = ("embedding.tokens.", "embedding.positions.")
    weights = sum(torch.Size(p.shape).numel() for p in parts_of(model) if len(p.shape) == 2 and not p.name.startswith(tables))
    weights += config.vocab_size * config.hidden if config.tie_embeddings else 0
    return 6.0 * weights + 6.0 * config.layers * config.heads * config.head_features * seq_length
