"""Which class of theirs a model of ours is: the one whose config.json, read back, means the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from teratron.checkpoint.huggingface.layouts import Link
from teratron.checkpoint.huggingface.reading import ARCHITECTURES
from teratron.checkpoint.huggingface.settings import Architecture, Settings
from teratron.checkpoint.source import Weights
from teratron.config import ModelConfig, UserError
from teratron.config.meaning import meaning


@dataclass(frozen=True)
class Described:
    """A model as one of their classes."""

    architecture: Architecture
    name: str
    content: dict[str, Any]
    """Of its config.json."""
    links: list[Link]


def describe(weights: Weights) -> Described:
    """The class for a model's weights. Raises `UserError` naming the key that no class of theirs can express."""
    config = weights.config
    nearest: tuple[int, str] | None = None
    for architecture, name in _candidates(weights):
        try:
            content = architecture.describe(config, name)
            form = architecture.forms[name]
            other = _difference(config, architecture.config(Settings(json.loads(json.dumps(content))), form))
            if not other:
                return Described(architecture, name, content, architecture.links(config, form))
        except UserError as error:
            other = [str(error)] * len(meaning(config))
        if nearest is None or len(other) < nearest[0]:
            nearest = len(other), f"{name} {other[0]}"
    says = nearest[1] if nearest is not None else "supported are gpt, encoder, encoder_decoder and xlnet"
    raise UserError(
        f"{weights.name}: no Hugging Face architecture known here is this model; the nearest, {says}: write it with --to weights"
    )


def _candidates(weights: Weights) -> list[tuple[Architecture, str]]:
    """Every class of the model's family and head; the first that fits is taken."""
    config = weights.config
    points = weights.run is not None and weights.run.objective.name == "pointing"
    names = [
        (architecture, name)
        for architecture in ARCHITECTURES
        for name, form in architecture.forms.items()
        if architecture.implied.get("family", "gpt") == config.family and form.implied.get("head", "language") == config.head
    ]
    return sorted(names, key=lambda pair: points != pair[1].endswith("QuestionAnswering"))


def _difference(wanted: ModelConfig, found: ModelConfig) -> list[str]:
    """What of a model gets lost, in words."""
    ours, theirs = meaning(wanted), meaning(found)
    return [f"has model.{key} = {theirs.get(key)}, not {ours[key]}" for key in ours if ours[key] != theirs.get(key)]
