"""How each part of a model is treated: its share of the learning rate, its weight decay, whether it learns at all (`optim.groups`)."""

from __future__ import annotations

from dataclasses import dataclass

from teratron.config import ModelConfig, OptimConfig, UserError
from teratron.config.groups import parse_group
from teratron.models import Part, build_model, parts_of
from teratron.models.adapters import SUFFIXES
from teratron.parallel.stages import Stages


@dataclass(frozen=True)
class Treatment:
    """What an update does to a part, beside what it does to all."""

    lr: float = 1.0
    """Factor of the learning rate."""
    decay: float = 0.0
    """Weight decay."""
    frozen: bool = False


def treatment_of(part: Part, config: OptimConfig, model: ModelConfig) -> Treatment:
    """Matrices decay, biases and norms do not (Megatron-LM's rule), unless a group says otherwise; later groups win over earlier ones.

    In a widened model matrices between features learn so many times slower, and decay as before (Yang et al. 2022). With adapters all but
    these and the head of a task is frozen.
    """
    lr, decay, widening = 1.0, config.weight_decay if len(part.shape) > 1 else 0.0, model.widening
    frozen = model.adapter_rank > 0 and not part.name.endswith(SUFFIXES) and not part.name.startswith("head.classes.")
    for group in map(parse_group, config.groups):
        if group.matches(part.name):
            lr = lr if group.lr is None else group.lr
            decay = decay if group.decay is None else group.decay
            frozen = group.frozen
    return Treatment(lr / widening, decay * widening, frozen) if part.inner else Treatment(lr, decay, frozen)


def freeze(stages: Stages, config: OptimConfig) -> None:
    """Parameters of frozen groups get no gradient. Before they lie in buckets.

    Raises `UserError` for a group of no part, and for one of which only some of the parts that lie in one matrix are frozen.
    """
    model = stages.config
    if not config.groups and not model.adapter_rank:
        return
    everywhere = parts_of(build_model(model, device="meta"))
    for text in config.groups:
        if not any(parse_group(text).matches(part.name) for part in everywhere):
            names = ", ".join(part.name for part in everywhere[:3])
            raise UserError(f"optim.groups: {text!r} matches no part of the model: expected a pattern of names such as {names}")
    if all(treatment_of(part, config, model).frozen for part in everywhere):
        if not config.groups:
            raise UserError(
                f"model.adapter_targets = {list(model.adapter_targets)}: the model has no such linear layer, nothing would learn"
            )
        raise UserError(f"optim.groups = {list(config.groups)} freezes every part, and nothing is left to learn: leave one out")
    parameters = dict(stages.named_parameters())
    for name, parts in _by_parameter(stages.parts()).items():
        frozen = [treatment_of(part, config, model).frozen for part in parts]
        if all(frozen):
            parameters[name].requires_grad_(False)
        elif any(frozen):
            one, other = parts[frozen.index(True)].name, parts[frozen.index(False)].name
            raise UserError(f"optim.groups freezes {one} but not {other}, which lie in one matrix: freeze both, or neither")


def _by_parameter(parts: list[Part]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.parameter, []).append(part)
    return found
