"""How a Hugging Face architecture is described: what its `config.json` says, and which tensor holds which parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from teratron.config import ModelConfig, UserError

_REQUIRED = object()


@dataclass(frozen=True)
class Settings:
    """The content of a `config.json`, read by key; every refusal names the key and its value."""

    content: dict[str, Any]

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """A key's value; null counts as absent. Raises `UserError` when a key without default is absent."""
        value = self.content.get(key)
        if value is None and default is _REQUIRED:
            raise UserError(f"'{key}' is missing: expected its value, as transformers' save_pretrained writes it")
        return default if value is None else value

    def only(self, key: str, value: Any) -> None:
        """Refuse any value of a key but the one that the model here has, which is also the default."""
        found = self.get(key, value)
        if found != value:
            raise UserError(f"'{key}' = {json.dumps(found)} is not supported, expected {json.dumps(value)}")

    def choose(self, key: str, default: str, choices: Mapping[str, Any]) -> Any:
        """What a key's value is called here."""
        found = self.get(key, default)
        if str(found) not in choices:
            raise UserError(f"'{key}' = {json.dumps(found)} is not supported, expected {'|'.join(choices)}")
        return choices[found]


@dataclass(frozen=True)
class Source:
    """A tensor of the file: the parts that it holds, one below the other along dimension 0."""

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    """Stored [in, out], as GPT-2's Conv1D does; a linear layer here is [out, in]."""


@dataclass(frozen=True)
class Architecture:
    """How one class of models is read."""

    model_type: str
    prefix: str
    """Before every name but those of heads; absent in files of the bare base model."""
    config: Callable[[Settings], ModelConfig]
    sources: Callable[[ModelConfig], Iterator[Source]]
    tied: tuple[str, ...] = ("lm_head.weight",)
    """Names under which files may hold the table of tokens, or what else is stored already, once more."""
