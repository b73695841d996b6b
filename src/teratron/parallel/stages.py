"""The stages that a pipeline rank holds: ranges of a model's units, cut as the plan says, one for each chunk of the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from teratron.config import ModelConfig, ParallelConfig
from teratron.models import FAMILIES, Model, Part, parts_of
from teratron.models.parts import leaves_and_parts
from teratron.parallel.apply import cut_model
from teratron.parallel.context import apply_context
from teratron.parallel.contrast import apply_contrast
from teratron.parallel.experts import apply_experts
from teratron.parallel.mesh import Mesh
from teratron.parallel.schedule_split import parse_split, split_layers
from teratron.parallel.schedules import SCHEDULES, placement

TABLE = "embedding.tokens.weight"
"""The part that stages share when embeddings are tied."""


class Stages(nn.Module):
    """The stages that one rank holds, by their global number; without a pipeline one stage, the whole model."""

    def __init__(self, models: Mapping[int, Model], units: Sequence[range] = (), table_ranks: Sequence[int] = (0,), rank: int = 0) -> None:
        """units: of every stage, here or elsewhere; table_ranks: who holds the table of tokens, first its owner; rank: of the pipeline."""
        super().__init__()
        self.models = nn.ModuleDict({str(stage): model for stage, model in models.items()})
        family = next(iter(models.values()))
        self.config = family.config
        self.units = list(units) or [range(family.count_units(self.config))]
        self.table_ranks, self.rank = list(table_ranks), rank

    def stages(self) -> dict[int, Model]:
        """The models by stage."""
        return {int(stage): model for stage, model in self.models.items()}  # type: ignore[misc]

    def parts(self) -> list[Part]:
        """What this rank holds; a table that several ranks hold is saved by its owner and says how many there are."""
        found = []
        for stage, model in self.models.items():
            for part in parts_of(model):
                holders = len(self.table_ranks) if part.name == TABLE else 1
                first = part.first and (holders == 1 or self.rank == self.table_ranks[0])
                found.append(replace(part, parameter=f"models.{stage}.{part.parameter}", holders=holders, first=first))
        return found


def cut_stages(config: ModelConfig, mesh: Mesh, parallel: ParallelConfig, dtype: torch.dtype = torch.float32) -> Stages:
    """This rank's stages on the meta device, cut as the plan says. Raises `UserError` for a split that does not fit."""
    pipeline = mesh.group("pipeline")
    held = placement(parallel.schedule, pipeline.size, chunk_count(parallel)) if pipeline.size > 1 else ((0,),)
    units = split_units(config, parallel, sum(map(len, held)))
    models = {stage: cut_model(config, mesh, parallel.sequence, dtype, units[stage]) for stage in held[pipeline.rank]}
    for model in models.values():
        apply_context(model, mesh.context, parallel.context_method)
        apply_experts(model, mesh, parallel)
        apply_contrast(model, mesh, parallel)
    _share_table(list(models.values()))
    rank_of = {stage: rank for rank, stages in enumerate(held) for stage in stages}
    users = [next(stage for stage, own in enumerate(units) if unit in own) for unit in FAMILIES[config.family].table_units(config)]
    return Stages(models, units, list(dict.fromkeys(rank_of[stage] for stage in users)), pipeline.rank)


def chunk_count(parallel: ParallelConfig) -> int:
    """Stages of each pipeline rank."""
    return parallel.chunks or SCHEDULES[parallel.schedule].least_chunks


def split_units(config: ModelConfig, parallel: ParallelConfig, stages: int) -> list[range]:
    """The units of every stage. Raises `UserError` for a split that does not fit."""
    units = FAMILIES[config.family].count_units(config)
    if stages == 1:
        return [range(units)]
    if parallel.split:
        return parse_split(parallel.split, units - 2, stages)
    layer = 4 * config.hidden**2 + (3 if config.gated else 2) * config.hidden * config.ffn_width
    heads, projection = config.predict_tokens, config.vocab_size * config.hidden / layer
    return split_layers(units - 2, stages, 0.0, heads * projection + heads - 1)


def _share_table(models: list[Model]) -> None:
    """Of one rank's stages that are tied to the table of tokens, the first holds it and the others use it."""
    held = [(model, leaf) for model in models for leaf, part in leaves_and_parts(model) if part.name == TABLE]
    for model, leaf in held[1:]:
        table, leaf.pieces = leaf.weight, [part for part in leaf.parts() if part.parameter != "weight"]
        for user in [module for module in model.modules() if getattr(module, "weight", None) is table]:
            user.weight = held[0][1].weight  # the leaf's own, and a head's that is tied to it
