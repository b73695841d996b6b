"""The config keys as text for `--help`, and as Markdown for docs/config.md (`python -m teratron.cli.help > docs/config.md`)."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

from teratron.config import Config, preset_names
from teratron.config.config import FREE_ON_RESUME, key_kinds
from teratron.config.keys import field_docs, kind_name


class Key(NamedTuple):
    """One config key, ready to print."""

    name: str
    kind: str
    default: str
    meaning: str


def key_help(width: int | None = None) -> str:
    """Every config key with its default, meaning and type, grouped by section and wrapped to `width` columns (default: the terminal's)."""
    columns = width or shutil.get_terminal_size((100, 24)).columns
    groups = list(_groups())
    name_width = max(len(key.name) for _, _, keys in groups for key in keys) + 2
    default_width = max(len(_short(key)) for _, _, keys in groups for key in keys)
    indent = 2 + name_width + 2 + default_width + 2
    lines = ["", "config keys, each with its default, meaning and [type]:"]
    for section, summary, keys in groups:
        lines += ["", *textwrap.wrap(f"{section}: {summary}", columns)]
        for key in keys:
            told = f" Default: {key.default}." if _short(key) != key.default else ""
            meaning = textwrap.wrap(
                f"{key.meaning}{told} [{key.kind.replace('|', ', ')}]",
                max(columns - indent, 30),
                break_long_words=False,
                break_on_hyphens=False,
            )
            lines.append(f"  {'--' + key.name:{name_width}}  {_short(key):{default_width}}  {meaning[0]}")
            lines += [" " * indent + line for line in meaning[1:]]
    notes = "Booleans: --section.key, --no-section.key or --section.key true|false. Lists take every value up to the next option."
    return "\n".join([*lines, "", *textwrap.wrap(notes, max(columns, 40))]) + "\n"


def _short(key: Key) -> str:
    """A default as its column has room for it."""
    return key.default if len(key.default) <= 16 else "..."


def markdown() -> str:
    """The whole of docs/config.md."""
    lines = [_INTRODUCTION.format(free=", ".join(f"`{name}*`" if name.endswith(".") else f"`{name}`" for name in FREE_ON_RESUME))]
    for section, summary, keys in _groups():
        lines += [f"## {section}", "", summary, "", "| key | default | type | meaning |", "|---|---|---|---|"]
        for key in keys:
            kind = ", ".join(f"`{choice}`" for choice in key.kind.split("|")) if "|" in key.kind else key.kind
            lines.append(f"| `{key.name}` | `{key.default}` | {kind} | {key.meaning} |")
        lines.append("")
    lines += ["## Presets", "", "`teratron train PRESET ...` starts from one of these; any key may be overridden after it.", ""]
    lines += ["| preset | layers | hidden | heads (key/value) | ffn | context | vocabulary | lr | steps | global batch | what it is |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_preset_row, preset_names())]) + "\n"


_INTRODUCTION = """\
# Config reference

<!-- Generated from the code: `make docs`. -->

A run is one config: the sections below, each a few typed keys. It is read from a preset or a TOML file, then from the command line:

```
teratron train gpt2-124m --data.text books/ --optim.lr 3e-4 --train.precision bf16 --run runs/books
```

- A TOML file has one table a section: `[optim]`, then `lr = 3e-4`. Keys that are left out keep their default.
- On the command line a key is `--section.key value` or `--section.key=value`; hyphens in a key equal underscores.
- A boolean is `--section.key`, `--no-section.key` or `--section.key true|false`. A list takes every value up to the next option.
- An unknown key, a wrong type or an impossible value is refused before anything starts, with the nearest right name.
- The whole config is kept in the run directory as `config.toml` and in every checkpoint.
- When a run goes on, these may change: {free}. Everything else decides the numbers and must stay.
"""


def _groups() -> Iterator[tuple[str, str, list[Key]]]:
    """Each section's name, summary and keys."""
    default = Config()
    for field in dataclasses.fields(Config):
        section = getattr(default, field.name)
        kind: type = type(section)
        docs = field_docs(kind)
        keys = [_key(f"{field.name}.{leaf}", getattr(section, leaf), meaning) for leaf, meaning in docs.items()]
        yield field.name, str(kind.__doc__), keys


def _key(name: str, default: Any, meaning: str) -> Key:
    return Key(name, kind_name(key_kinds()[name]), _shown(default), meaning)


def _shown(value: Any) -> str:
    """A default as one would type it; a lone quote pair for nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) or '""' if isinstance(value, tuple) else str(value) or '""'


def _preset_row(name: str) -> str:
    config = Config.preset(name)
    model, train = config.model, config.train
    source = (resources.files("teratron.config") / "presets" / f"{name}.toml").read_text("utf-8").splitlines()[0].removeprefix("# ")
    vocabulary = str(model.vocab_size or "the tokenizer's")
    cells = [f"`{name}`", model.layers, model.hidden, f"{model.heads} ({model.key_value_heads})", model.ffn_width, model.seq_length]
    cells += [vocabulary, config.optim.lr, train.steps, config.largest_batch, source]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print(markdown(), end="")
