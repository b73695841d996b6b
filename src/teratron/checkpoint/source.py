"""A model's weights wherever they come from: a run, a file, the folder of another system."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from teratron.checkpoint.mapped import joined
from teratron.checkpoint.stream import Entry
from teratron.config import Config, ModelConfig, UserError
from teratron.config.sections import ObjectiveConfig
from teratron.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from teratron.models import parts_of
from teratron.models.parts import check_parts
from teratron.parallel.apply import replace_parameters

USUAL_OBJECTIVE = {"gpt": "next_token", "encoder": "masked", "encoder_decoder": "denoising", "xlnet": "permuted"}


@dataclass(frozen=True)
class Weights:
    """A model's weights, read part by part, never all at once."""

    config: ModelConfig
    parts: list[Entry]
    """Every part of the model by its name, in module order; an `Entry.values` reads it whole."""
    tokenizer: Tokenizer | None
    name: str
    """Where they come from, for messages."""
    run: Config | None = None
    """The config of the run that made them, where it is known."""
    step: int = 0

    def run_config(self) -> Config:
        """The run's config; where none is known, one with the objective that is usual for the family."""
        if self.run is not None:
            return self.run
        sentence = "next" if self.config.pooler else "none"
        return Config(model=self.config, objective=ObjectiveConfig(name=USUAL_OBJECTIVE[self.config.family], sentence=sentence))  # type: ignore[arg-type]

    def cast(self, dtype: torch.dtype | None) -> Weights:
        """The same in another type; None = as they are. Reading refuses numbers that would become infinite."""
        return self if dtype is None else replace(self, parts=[_cast(entry, dtype) for entry in self.parts])


def _cast(entry: Entry, dtype: torch.dtype) -> Entry:
    def values() -> Tensor:
        found = entry.values()
        _check_range(entry.name, found, dtype)
        return found.to(dtype)

    return entry._replace(dtype=dtype, values=values)


def _check_range(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Refuse numbers that would become infinite."""
    limit = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max <= limit or not values.numel():
        return
    largest = max(abs(float(bound)) for bound in torch.aminmax(values))
    if limit < largest < float("inf"):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} holds {largest:.4g}, more than the {limit:.4g} of {kind}: choose bf16, or leave --dtype out")


def load_entries(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Copy parts into a model, or each rank's pieces of them, one after the other."""
    by_name = {entry.name: entry for entry in entries}
    parts, parameters = parts_of(model), dict(model.named_parameters())
    check_parts(parts, {name: tuple(entry.shape) for name, entry in by_name.items()})
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()  # padding of the vocabulary stays zero
        for part in parts:
            part.of(parameters[part.parameter]).copy_(by_name[part.name].values()[part.box()])


def use_entries(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Make the stored tensors the parameters of a model on the meta device, whole and in their own numbers.

    What lies in a file as it is needed stays there, and comes into memory page by page when it is used; the rest is read. Nothing is held
    twice. Tables have no padding then.
    """
    by_name = {entry.name: entry for entry in entries}
    parts = parts_of(model)
    check_parts(parts, {name: tuple(entry.shape) for name, entry in by_name.items()})
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        found.setdefault(part.parameter, []).append(by_name[part.name].values())
    replace_parameters(model, {name: joined(values) for name, values in found.items()})


def side_by_side(entries: Iterable[Entry]) -> list[Entry]:
    """Parts in an order in which those of a fused leaf lie one behind the other, so that a file of them can be used as it is.

    Such as q.weight, k.weight, v.weight, q.bias, k.bias, v.bias of the same attention.
    """
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        path, _, kind = entry.name.rpartition(".")
        groups.setdefault((path.rpartition(".")[0], kind), []).append(entry)
    return [entry for group in groups.values() for entry in group]


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None when there is no file of one."""
    return load_tokenizer(folder) if folder.is_dir() and find_tokenizer(folder) else None
