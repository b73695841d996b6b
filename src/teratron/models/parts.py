"""Parts: the named pieces of a model's parameters. Initialisation, optimizers, checkpoints and converters see parts only (contract C7)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teratron.models.leaves import LeafPart
from teratron.models.random import normal_rows


@dataclass(frozen=True)
class Part:
    """One part: rows [start, start + shape[0]) of a parameter's dimension 0."""

    name: str
    """Module path with global layer numbers, such as `blocks.3.attention.q.weight`."""
    parameter: str
    """Name of the parameter that holds it, as in `model.named_parameters()`."""
    start: int
    shape: tuple[int, ...]
    """Full, unpadded shape."""
    std: float | None
    fill: float

    def of(self, tensor: Tensor) -> Tensor:
        """This part's view of a tensor shaped like its parameter."""
        return tensor[self.start : self.start + self.shape[0]]


def parts_of(model: nn.Module) -> list[Part]:
    """Every part of a model, in module order; a shared parameter appears once, under its owner."""
    found = []
    for path, module in model.named_modules():
        leaf_parts: Iterable[LeafPart] = module.leaf_parts() if hasattr(module, "leaf_parts") else ()
        parent = path.rpartition(".")[0]
        for part in leaf_parts:
            name = path + part.name if part.name.startswith(".") else f"{parent}.{part.name}"
            found.append(Part(name, f"{path}.{part.parameter}", part.start, part.shape, part.std, part.fill))
    return found


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


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model without padding; works on the meta device."""
    return sum(torch.Size(part.shape).numel() for part in parts_of(model))


def flops_per_token(model: nn.Module, seq_length: int) -> float:
    """Floating-point operations of one token's forward and backward pass.

    6 for each weight of a matrix product (the output projection included, the embedding look-up not) and the causal half of
    the attention products, as Megatron-LM counts; recomputation is never counted.
    """
    config = model.config  # type: ignore[union-attr]
    tables = ("embedding.tokens.", "embedding.positions.")
    weights = sum(torch.Size(p.shape).numel() for p in parts_of(model) if len(p.shape) == 2 and not p.name.startswith(tables))
    weights += config.vocab_size * config.hidden if config.tie_embeddings else 0
    return 6.0 * weights + 6.0 * config.layers * config.heads * config.head_features * seq_length
