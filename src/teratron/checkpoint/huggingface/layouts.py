"""Which tensors of another system hold which parts of a model, and how: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from teratron.config import ModelConfig, UserError
from teratron.models import build_model, parts_of

Tensors = list[Tensor]


class Layout(NamedTuple):
    """How parts lie in tensors."""

    join: Callable[[Tensors, ModelConfig], Tensors]
    """Theirs from ours."""
    split: Callable[[Tensors, Tensors, ModelConfig], Tensors]
    """Ours from theirs, given tensors of the shapes that ours have."""


def _below(theirs: Tensors, ours: Tensors, _: ModelConfig) -> Tensors:
    return list(theirs[0].split([part.shape[0] for part in ours]))


def _pairs(rows: Tensor, config: ModelConfig) -> Tensor:
    """The rotated rows of each head, halves, as neighbours."""
    return _turned(rows, config, lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def _halves(rows: Tensor, config: ModelConfig) -> Tensor:
    """The rotated rows of each head, neighbours, as halves."""
    return _turned(rows, config, lambda x: x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))


def _turned(rows: Tensor, config: ModelConfig, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows whose last of each head are changed; with latent attention a single head's keys are all rotated."""
    rotated = config.rotary_features
    width = rotated if len(rows) == rotated else config.key_features
    plain, turned = rows.unflatten(0, (-1, width)).tensor_split([width - rotated], dim=1)
    return torch.cat((plain, change(turned)), dim=1).flatten(0, 1)


def _each_head(ours: Tensors, config: ModelConfig) -> Tensors:
    return [torch.stack([part.unflatten(0, (config.heads, -1)) for part in ours], dim=1).flatten(0, 2)]


def _of_each_head(theirs: Tensors, ours: Tensors, config: ModelConfig) -> Tensors:
    parts = theirs[0].unflatten(0, (config.heads, len(ours), -1)).unbind(1)
    return [part.flatten(0, 1) for part in parts]


BELOW = Layout(lambda ours, _: [torch.cat(ours) if len(ours) > 1 else ours[0]], _below)
"""One tensor holds the parts, one below the other."""
TRANSPOSED = Layout(
    lambda ours, config: [BELOW.join(ours, config)[0].t()], lambda theirs, ours, config: _below([theirs[0].t()], ours, config)
)
"""The same with [in, out] for [out, in]."""
EACH_HEAD = Layout(_each_head, _of_each_head)
"""The rows of each head together: its query's, its key's, its value's."""
STACKED = Layout(lambda ours, _: list(ours[0].unbind()), lambda theirs, *_: [torch.stack(theirs)])
"""One tensor for each row of dimension 0 of a part."""
RESHAPED = Layout(
    lambda ours, config: [ours[0].t().unflatten(1, (config.heads, -1))], lambda theirs, *_: [theirs[0].flatten(1).t()]
)  # fmt: skip
"""[in, heads, features] for [heads * features, in]."""
OF_HEADS = Layout(lambda ours, config: [ours[0].unflatten(-1, (config.heads, -1))], lambda theirs, *_: [theirs[0].flatten(-2)])
"""The last dimension as [heads, features]."""
UNSQUEEZED = Layout(lambda ours, _: [ours[0].unsqueeze(0)], lambda theirs, *_: [theirs[0].squeeze(0)])
NEIGHBOURS = Layout(
    lambda ours, config: [torch.cat([*ours[:-1], _pairs(ours[-1], config)])],
    lambda theirs, ours, config: [*(rows := _below(theirs, ours, config))[:-1], _halves(rows[-1], config)],
)
"""As BELOW; of the last part the rotated features of each head are neighbours, where ours are halves."""


@dataclass(frozen=True)
class Row:
    """The parts behind a name of theirs: `#` stands for the number of a layer, `*` for weight or bias, `@` for an expert."""

    ours: tuple[str, ...]
    layout: Layout = BELOW


@dataclass(frozen=True)
class Link:
    """Tensors of theirs and the parts of ours that hold the same numbers."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout
    config: ModelConfig
    shapes: tuple[torch.Size, ...]
    """Of ours."""

    def their_shapes(self) -> list[torch.Size]:
        return [tensor.shape for tensor in self.layout.join(self._blanks(), self.config)]

    def join(self, ours: Tensors) -> Tensors:
        return self.layout.join(ours, self.config)

    def split(self, theirs: Tensors) -> Tensors:
        return self.layout.split(theirs, self._blanks(), self.config)

    def _blanks(self) -> Tensors:
        return [torch.empty(shape, device="meta") for shape in self.shapes]


def links(table: Mapping[str, str | Row], config: ModelConfig) -> Iterator[Link]:
    """Every part of a model once, in its order, linked by the rows of a table. Raises `UserError` for a part that no row names."""
    shapes = {part.name: torch.Size(part.shape) for part in parts_of(build_model(config, device="meta"))}
    rows = [(theirs, Row((row,)) if isinstance(row, str) else row) for theirs, row in table.items()]
    known = [(_pattern(row.ours[0]), theirs, row) for theirs, row in rows]
    done: set[str] = set()
    for name in shapes:
        if name in done:
            continue
        link = next((link for pattern, theirs, row in known if (link := _link(name, pattern, theirs, row, config, shapes))), None)
        if link is None:
            raise UserError(f"the model has {name}, for which there is no tensor")
        done.update(link.ours)
        yield link


def _pattern(ours: str) -> re.Pattern[str]:
    escaped = re.escape(ours).replace(r"\#", r"(?P<layer>\d+)").replace(r"\*", "(?P<kind>weight|bias)")
    return re.compile(escaped)


def _link(name: str, pattern: re.Pattern[str], theirs: str, row: Row, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Link | None:
    found = pattern.fullmatch(name)
    if found is None:
        return None
    fill = partial(_filled, found.groupdict())
    ours = tuple(map(fill, row.ours))
    experts = range(shapes[name][0]) if "@" in theirs else range(1)
    names = tuple(fill(theirs).replace("@", str(expert)) for expert in experts)
    return Link(names, ours, row.layout, config, tuple(shapes[part] for part in ours))


def _filled(found: Mapping[str, str], text: str) -> str:
    return text.replace("#", found.get("layer", "#")).replace("*", found.get("kind", "*"))
