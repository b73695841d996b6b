"""Parts: the named pieces of a model's parameters. Initialisation, optimizers, checkpoints and converters see parts only (contract C7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from teratron.config import UserError
from teratron.models.adapters import SUFFIXES
from teratron.models.leaves import Embedding, Leaf, Part
from teratron.models.patterns import FULL, keys_seen, pattern_of
from teratron.models.random import normal_box
from teratron.models.units import Model


def parts_of(model: nn.Module) -> list[Part]:
    """Every part of a model, in module order; a shared parameter appears once, under its owner."""
    return [part for _, part in leaves_and_parts(model)]


def leaves_and_parts(model: nn.Module) -> Iterator[tuple[Leaf, Part]]:
    """Every leaf with each of its parts, under their full names."""
    for path, module in model.named_modules():
        for part in module.parts() if isinstance(module, Leaf) else ():
            parameter = f"{path}.{part.parameter}".removeprefix(".")
            rows = part.lengths_of and replace(part.lengths_of, name=_full_name(path, part.lengths_of.name))
            yield module, replace(part, name=_full_name(path, part.name), parameter=parameter, lengths_of=rows)


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
            part.of(parameters[part.parameter]).copy_(initial_values(part, seed, part.box()))


def initial_values(part: Part, seed: int, box: tuple[slice, ...], given: Mapping[str, Callable[[], Tensor]] | None = None) -> Tensor:
    """The initial values of a region of a part's full shape, on CPU: float32, or those of the whole tensors that are given by name."""
    if given is not None and part.name in given:
        return given[part.name]()[box]
    if part.lengths_of is not None:
        rows = initial_values(part.lengths_of, seed, (*box, slice(0, part.lengths_of.shape[1])), given)
        return rows.double().norm(dim=1)
    if part.std is None:
        return torch.full([index.stop - index.start for index in box], part.fill)
    return normal_box(seed, part.name, part.shape, box) * part.std


def load_parts(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy parts by name into a model's parameters, in their dtype; padding of the vocabulary becomes zero.

    tensors are whole; a model that is cut takes its pieces of them.
    Raises `UserError` naming the parts that are missing, unexpected or of another shape; the model is then unchanged.
    """
    parts = parts_of(model)
    check_parts(parts, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        for part in parts:
            part.of(parameters[part.parameter]).copy_(tensors[part.name][part.box()])


def check_parts(parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `UserError` unless there is exactly a tensor of the right shape for every part."""
    hint = "model.* differs from what made these weights"
    names = dict.fromkeys(part.name for part in parts)
    missing, unexpected = [name for name in names if name not in shapes], [name for name in shapes if name not in names]
    for kind, wrong in (("missing", missing), ("not in this model", unexpected)):
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"weights {kind}: {', '.join(wrong[:3])}{more}: {hint}")
    for part in parts:
        if shapes[part.name] != part.shape:
            raise UserError(f"{part.name}: found shape {list(shapes[part.name])}, expected {list(part.shape)}: {hint}")


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model without padding; works on the meta device."""
    return sum(torch.Size(part.shape).numel() for part in parts_of(model))


def flops_per_token(model: Model, seq_length: int, predicted: float = 1.0) -> float:
    """Floating-point operations of one token's forward and backward pass.

    6 for each weight of a matrix product (the output projection included, the embedding look-up not; of stacked experts those
    that one token is sent to), 4 where adapters learn in its place, and 6 for each feature of a key or value that a query sees;
    recomputation is never counted. Without a window that is the causal half of the attention products, as Megatron-LM counts.
    predicted: the share of tokens that are predicted; no others cost an output projection. With an encoder and a decoder tokens are
    those that are read; that share of them is written.
    """
    config = model.config
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    whole = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in tables}
    used = [p for p in parts_of(model) if p.parameter in whole]
    weights: float = sum(torch.Size(p.shape).numel() * _share(p.name, predicted) for p in used if len(p.shape) == 2)
    adapters: float = sum(torch.Size(p.shape).numel() * _share(p.name, predicted) for p in used if p.name.endswith(SUFFIXES))
    weights += config.experts_per_token * sum(torch.Size(p.shape[1:]).numel() for p in used if len(p.shape) == 3)
    projections = predicted * config.predict_tokens - (not config.tie_embeddings)  # an untied one is already among the parts
    projections *= config.head == "language"
    weights += projections * config.vocab_size * config.hidden
    layers = [*range(config.layers), *[config.layers - 1] * (config.predict_tokens - 1)]
    patterns = [FULL if config.attends_everywhere(layer) else pattern_of(config) for layer in layers]
    if len(model.streams) > 1:
        seen = sum(keys_seen(pattern, False, seq_length) for pattern in patterns)
        seen += predicted * sum(keys_seen(pattern, True, round(predicted * seq_length)) + seq_length for pattern in patterns)
    else:
        seen = sum(keys_seen(pattern, model.streams[""], seq_length) for pattern in patterns)
    passes = 4.0 * weights + 2.0 * adapters if config.adapter_rank else 6.0 * weights
    return passes + 6.0 * config.heads * (config.key_features + config.value_features) * seen


def _share(part: str, predicted: float) -> float:
    """Tokens that a weight meets for each one that is read: a decoder's those that are written, but for its memory's keys and values."""
    read = not part.startswith("decoder.") or part.endswith((".cross_attention.k.weight", ".cross_attention.v.weight"))
    return 1.0 if read else predicted
