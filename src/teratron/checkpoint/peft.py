"""Adapters as PEFT keeps them: a folder of adapter_config.json and adapter_model.safetensors beside a Hugging Face model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.adapters import base_of, merged, with_product
from teratron.checkpoint.format import publish, write_synced
from teratron.checkpoint.huggingface.describing import Described, describe
from teratron.checkpoint.huggingface.layouts import BELOW, EACH_HEAD, NEIGHBOURS, TRANSPOSED, Layout, Link
from teratron.checkpoint.huggingface.reading import read_json
from teratron.checkpoint.huggingface.settings import Settings
from teratron.checkpoint.probe import compare_logits
from teratron.checkpoint.shards import Shards
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry, write_safetensors
from teratron.config import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "base_model.model."
_TENSOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?")
_ROWS: Mapping[int, Layout] = {id(BELOW): BELOW, id(TRANSPOSED): BELOW, id(EACH_HEAD): EACH_HEAD, id(NEIGHBOURS): NEIGHBOURS}
"""How rows lie in what has a row for each output, by the layout of the weight."""
_TASKS = {("gpt", "language"): "CAUSAL_LM", ("encoder_decoder", "language"): "SEQ_2_SEQ_LM", ("encoder", "classes"): "TOKEN_CLS"}


@dataclass(frozen=True)
class Module:
    """A linear layer of theirs that is adapted; a fused one has several parts of ours, with a pair of matrices each."""

    name: str
    link: Link
    adapted: tuple[int, ...]
    """Which of the parts are."""

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What has a row for each output, [rows, ...] of each part, as it lies in theirs."""
        return replace(self.link, layout=_rows(self.link)).join(list(parts))[0]

    def split(self, rows: Tensor) -> list[Tensor]:
        """The way back."""
        shapes = tuple(torch.Size((shape[0], *rows.shape[1:])) for shape in self.link.shapes)
        return replace(self.link, layout=_rows(self.link), shapes=shapes).split([rows])


def _rows(link: Link) -> Layout:
    return _ROWS[id(link.layout)]


def write_peft(weights: Weights, folder: Path, overwrite: bool = False) -> str:
    """Write a model's adapters, and a new head, as a folder that PEFT loads onto the same base; returns what there is to tell.

    A fused layer of theirs gets one pair of matrices of all its parts' ranks together. The folder appears when, read back onto the base,
    it gives the model's logits. Raises `UserError` for a model without
    adapters or that no class of theirs is, and where the folder exists or cannot be written.
    """
    if not weights.config.adapter_rank:
        raise UserError(f"{weights.name}: has no adapters, model.adapter_rank = 0: write it with --to huggingface")
    if folder.exists() and not (overwrite and (folder / CONFIG).is_file()):
        raise UserError(f"{folder}: exists: choose another name, or add --overwrite, which replaces a folder of adapters alone")
    described, ours = describe(merged(weights)), {entry.name: entry for entry in weights.parts}
    modules = [_module(described, link, ours) for link in described.links if _any(link, ours)]
    entries = [entry for module in modules for entry in _entries(module, ours, weights.config.adapter_scale)]
    heads = [(link, _name(described, link)) for link in described.links if link.ours[0].startswith("head.classes.")]
    entries += [ours[link.ours[0]]._replace(name=_BASE + name) for link, name in heads]
    place = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        write_safetensors(place / TENSORS, entries, {"format": "pt"})
        said = _config(weights, described, modules, [name for _, name in heads])
        write_synced(place / CONFIG, json.dumps(said, indent=2, sort_keys=True).encode())
        compared = compare_logits(merged(exact := _exact(weights)), with_adapter(base_of(exact), place))
        publish(place, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}: free some space, or choose another place") from None
    return f"adapters of {len(modules)} layers for {described.name}; {compared}"


def _exact(weights: Weights) -> Weights:
    """In a type in which products of adapters are rounded alike wherever they are computed."""
    return weights.cast(torch.promote_types(weights.parts[0].dtype, torch.float32))


def _layer(part: str) -> str:
    return part.removesuffix(".weight")


def _any(link: Link, ours: Mapping[str, Entry]) -> bool:
    """Whether one of the parts is adapted."""
    return any(f"{_layer(part)}.lora_b" in ours for part in link.ours)


def _name(described: Described, link: Link) -> str:
    """Of a tensor of theirs, as the class calls it."""
    architecture = described.architecture
    return link.theirs[0].removeprefix(architecture.prefix if architecture.forms[described.name].bare else "")


def _module(described: Described, link: Link, ours: Mapping[str, Entry]) -> Module:
    adapted = tuple(place for place, part in enumerate(link.ours) if f"{_layer(part)}.lora_b" in ours)
    if id(link.layout) not in _ROWS:
        raise UserError(f"{_name(described, link)} is no linear layer in {described.name}, PEFT has no adapters for it: merge them instead")
    return Module(_layer(_name(described, link)), link, adapted)


def _entries(module: Module, ours: Mapping[str, Entry], scale: float) -> list[Entry]:
    """A module's tensors of theirs."""
    layers = [_layer(part) for part in module.link.ours]
    factors = [ours[f"{layers[place]}.lora_a"] for place in module.adapted]
    (rank, inputs), dtype = factors[0].shape, factors[0].dtype
    total, rows = rank * len(factors), sum(shape[0] for shape in module.link.shapes)
    name = _BASE + module.name

    def a() -> Tensor:
        return torch.cat([factor.values() for factor in factors])

    def b() -> Tensor:
        blocks = [torch.zeros(shape[0], total, dtype=dtype) for shape in module.link.shapes]
        for number, place in enumerate(module.adapted):
            blocks[place][:, number * rank : (number + 1) * rank] = ours[f"{layers[place]}.lora_b"].values()
        return module.joined(blocks)

    precise = torch.promote_types(dtype, torch.float32)  # a half type would scale whole rows by its rounding

    def lengths() -> Tensor:
        own = [ours[f"{layer}.{'magnitude' if n in module.adapted else 'weight'}"].values().to(precise) for n, layer in enumerate(layers)]
        found = [length if length.dim() == 1 else length.norm(dim=1) for length in own]
        return module.joined([length.unsqueeze(1) for length in found]).squeeze(1)

    made = [Entry(f"{name}.lora_A.weight", dtype, (total, inputs), a), Entry(f"{name}.lora_B.weight", dtype, (rows, total), b)]
    dora = f"{layers[module.adapted[0]]}.magnitude" in ours
    return [*made, Entry(f"{name}.lora_magnitude_vector", precise, (rows,), lengths)] if dora else made


def _config(weights: Weights, described: Described, modules: Sequence[Module], heads: Sequence[str]) -> dict[str, Any]:
    """The content of adapter_config.json."""
    config = weights.config
    fused = {module.name: len(module.adapted) for module in modules if len(module.adapted) > 1}
    alpha = int(config.adapter_alpha) if config.adapter_alpha.is_integer() else config.adapter_alpha
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get((config.family, config.head)),
        "base_model_name_or_path": None,
        "r": config.adapter_rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: count * config.adapter_rank for name, count in fused.items()},
        "alpha_pattern": {name: count * alpha for name, count in fused.items()},
        "target_modules": [module.name for module in modules],
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads}) or None,
        "use_dora": config.adapter_dora,
        "use_rslora": False,
        "fan_in_fan_out": any(module.link.layout is TRANSPOSED for module in modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def with_adapter(base: Weights, folder: Path) -> Weights:
    """A model with the adapters in a folder of PEFT's merged into its weights, and with the other tensors there in place of its own.

    Raises `UserError` for another kind of adapter, and for tensors that do not fit the model.
    """
    settings = _settings(folder)
    described = describe(base)
    prefix = described.architecture.prefix
    links = {link.theirs[0].removeprefix(prefix): link for link in described.links if len(link.theirs) == 1}
    shards = Shards([folder / TENSORS], "download it again")
    parts = {entry.name: entry for entry in base.parts}
    pairs: dict[str, dict[str, Entry]] = {}
    for stored in shards.entries():
        bare = stored.name.removeprefix(_BASE).removeprefix(prefix)
        found = _TENSOR.fullmatch(bare)
        link = links.get(f"{found[1]}.weight" if found else bare)
        if link is None or (found and id(link.layout) not in _ROWS):
            raise UserError(
                f"{folder}: {stored.name} has no place in {described.name} as {base.name} is: give the base that it was made for"
            )
        if found:
            pairs.setdefault(found[1], {})[found[2]] = stored
        else:
            parts |= _replaced(folder, stored, link, parts)
    if not pairs:
        raise UserError(f"{folder / TENSORS}: holds no lora_A and lora_B: give a folder of LoRA adapters")
    for name, pair in pairs.items():
        module = Module(name, links[f"{name}.weight"], ())
        parts |= _adapted(folder, module, pair, parts, _scale(settings, name, prefix))
    return replace(base, parts=[parts[entry.name] for entry in base.parts], name=f"{base.name} with {folder}")


def _settings(folder: Path) -> Settings:
    """adapter_config.json, where it says nothing that is not to be had here."""
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise UserError(f"{folder}: expected {CONFIG} and {TENSORS}, as PEFT's save_pretrained writes them")
    settings = Settings(read_json(folder / CONFIG))
    try:
        settings.only("peft_type", "LORA")
        settings.only("bias", "none")
        settings.only("lora_bias", False)
        for key in ("layer_replication", "trainable_token_indices", "target_parameters"):
            if settings.get(key, None):
                settings.only(key, None)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    return settings


def _scale(settings: Settings, name: str, prefix: str) -> float:
    """What multiplies B A of a module."""

    def of(key: str, pattern: str) -> Any:
        for part, value in settings.get(pattern, {}).items():
            if any(re.fullmatch(rf"(.*\.)?({part})", called) for called in (name, prefix + name)):
                return value
        return settings.get(key)

    rank = of("r", "rank_pattern")
    return float(of("lora_alpha", "alpha_pattern") / (rank**0.5 if settings.get("use_rslora", False) else rank))


def _replaced(folder: Path, stored: Entry, link: Link, parts: Mapping[str, Entry]) -> dict[str, Entry]:
    """The parts of a whole tensor."""
    _check_shape(folder, stored, link.their_shapes()[0])
    return {part: parts[part]._replace(values=partial(_nth, link, stored, n)) for n, part in enumerate(link.ours)}


def _nth(link: Link, stored: Entry, number: int) -> Tensor:
    return link.split([stored.values()])[number]


def _adapted(folder: Path, module: Module, pair: Mapping[str, Entry], parts: Mapping[str, Entry], scale: float) -> dict[str, Entry]:
    """The parts of a module with its product added."""
    absent = [kind for kind in ("lora_A", "lora_B") if kind not in pair]
    if absent:
        raise UserError(f"{folder / TENSORS}: holds no {module.name}.{absent[0]}.weight beside its partner: download it again")
    a, b, lengths = pair["lora_A"], pair["lora_B"], pair.get("lora_magnitude_vector")
    rows, rank = sum(shape[0] for shape in module.link.shapes), b.shape[-1]
    _check_shape(folder, a, (rank, module.link.shapes[0][1]))
    _check_shape(folder, b, (rows, rank))

    def part_of(number: int) -> Entry:
        magnitude = None if lengths is None else (lambda: module.split(lengths.values().reshape(-1, 1))[number].squeeze(1))
        return with_product(parts[module.link.ours[number]], a.values, lambda: module.split(b.values())[number], scale, magnitude)

    return {name: part_of(number) for number, name in enumerate(module.link.ours)}


def _check_shape(folder: Path, stored: Entry, expected: Sequence[int]) -> None:
    if list(stored.shape) != list(expected):
        raise UserError(
            f"{folder / TENSORS}: {stored.name} has shape {list(stored.shape)}, the model needs {list(expected)}: give the base "
            "that it was made for"
        )
