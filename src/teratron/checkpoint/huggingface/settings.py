"""What a `config.json` and `model.*` call the same thing: each key once, read in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from teratron.checkpoint.huggingface.layouts import Link, Row, links
from teratron.config import ModelConfig, UserError

_REQUIRED = object()
Ours = dict[str, Any]
"""Keys of `model.*` and their values."""


@dataclass(frozen=True)
class Settings:
    """The content of a `config.json`, read by key; every refusal names the key and its value."""

    content: Mapping[str, Any]

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """A key's value; null counts as absent. Raises `UserError` when a key without default is absent."""
        value = self.content.get(key)
        if value is None and default is _REQUIRED:
            raise UserError(f"'{key}' is missing: expected its value, as transformers' save_pretrained writes it")
        return default if value is None else value

    def only(self, key: str, *values: Any) -> None:
        """Refuse any value of a key but those that the model here has, of which the first is the default."""
        found = self.get(key, values[0])
        if found not in values:
            raise UserError(f"'{key}' = {json.dumps(found)} is not supported, expected {' or '.join(map(json.dumps, values))}")


class Setting(Protocol):
    """One or a few keys of theirs with what they are here."""

    def read(self, settings: Settings) -> Ours: ...

    def write(self, config: ModelConfig) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Key:
    """A key of theirs with one of ours."""

    theirs: str
    ours: str
    default: Any = _REQUIRED
    """Theirs, where the key is absent."""
    words: Mapping[Any, Any] | None = None
    """What their values are called here; None = the same."""
    property: str = ""
    """Of `ModelConfig`, where the key may hold a 0 that stands for another number."""
    shift: int = 0
    """Theirs is so much larger."""
    older: str = ""
    """Another name that files may have."""

    def read(self, settings: Settings) -> Ours:
        value = settings.get(self.theirs, None)
        value = settings.get(self.older or self.theirs, self.default) if value is None else value
        if self.words is None:
            return {self.ours: value - self.shift if self.shift and isinstance(value, int) else value}
        if value not in self.words:
            choices = "|".join(str(word) if isinstance(word, str) else json.dumps(word) for word in self.words)
            raise UserError(f"'{self.theirs}' = {json.dumps(value)} is not supported, expected {choices}")
        return {self.ours: self.words[value]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = getattr(config, self.property or self.ours)
        if self.words is not None:
            value = next((theirs for theirs, ours in self.words.items() if ours == value), next(iter(self.words)))
        return {self.theirs: value + self.shift if self.shift else value}


@dataclass(frozen=True)
class Only:
    """A key of theirs that may have but one value here."""

    theirs: str
    value: Any
    more: tuple[Any, ...] = ()
    """Values that mean the same."""

    def read(self, settings: Settings) -> Ours:
        settings.only(self.theirs, self.value, *self.more)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Like:
    """A key of theirs that must have the value of another one."""

    theirs: str
    other: str
    default: Any = _REQUIRED

    def read(self, settings: Settings) -> Ours:
        settings.only(self.theirs, settings.get(self.other, self.default))
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: ("like", self.other)}


@dataclass(frozen=True)
class Told:
    """A key of theirs that is written but means nothing here, such as dropout: a choice of training, not of the weights."""

    theirs: str
    ours: str

    def read(self, settings: Settings) -> Ours:
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: getattr(config, self.ours)}


@dataclass(frozen=True)
class Both:
    """What takes a function in each direction."""

    reads: Callable[[Settings], Ours]
    writes: Callable[[ModelConfig], dict[str, Any]]

    def read(self, settings: Settings) -> Ours:
        return self.reads(settings)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return self.writes(config)


Table = Mapping[str, str | Row]


@dataclass(frozen=True)
class Form:
    """A class of theirs: the same body with another head."""

    implied: Ours = field(default_factory=dict)
    table: Table = field(default_factory=dict)
    """Tensors of the head, which win over those of the architecture."""
    labels: bool = False
    """Whether config.json counts classes."""
    bare: bool = False
    """Whether names lack the architecture's prefix."""


@dataclass(frozen=True)
class Architecture:
    """A kind of model of theirs: what its config and its tensors are here."""

    model_type: str
    prefix: str
    """Before every name but those of heads; absent in files of the bare base model."""
    forms: Mapping[str, Form]
    """By the names of classes; the first where a file names none."""
    settings: tuple[Setting, ...]
    table: Table
    implied: Ours = field(default_factory=dict)
    """What none of their keys says."""
    copies: tuple[str, ...] = ("lm_head.weight",)
    """Names under which files may hold, once more, what is stored already where embeddings are tied."""
    blank: Mapping[str, Callable[[ModelConfig], tuple[int, ...]]] = field(default_factory=dict)
    """Tensors of theirs that have no part here: not read, written as zeros; `#` is the number of a layer."""
    gated: Table = field(default_factory=dict)
    """Tensors of models with a gate, where these have other names."""

    def config(self, settings: Settings, form: Form) -> ModelConfig:
        """The model that a config.json describes. Raises `UserError` naming the key that says what is not to be had here."""
        settings.only("quantization_config", None)
        ours = {**self.implied, **form.implied}
        for setting in self.settings:
            ours |= {key: value for key, value in setting.read(settings).items() if key not in form.implied}
        if form.labels:
            ours["classes"] = settings.get("num_labels", len(settings.get("id2label", {0: "", 1: ""})))
        return ModelConfig(**ours)

    def describe(self, config: ModelConfig, name: str) -> dict[str, Any]:
        """The config.json of a model as class `name`; what cannot be said in it is not there."""
        said: dict[str, Any] = {"architectures": [name], "model_type": self.model_type}
        for setting in self.settings:
            said |= setting.write(config)
        said = {key: said[value[1]] if isinstance(value, tuple) else value for key, value in said.items()}
        if self.forms[name].labels:
            labels = [f"LABEL_{number}" for number in range(config.classes)]
            said |= {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
        return said

    def links(self, config: ModelConfig, form: Form) -> list[Link]:
        """Every part of a model with the tensors that hold it."""
        return list(links({**form.table, **(self.gated if config.gated else {}), **self.table}, config))
