"""Command-line options of the form `--section.key value` become overrides of a config."""

from __future__ import annotations

from collections.abc import Sequence

from teratron.config.config import key_kinds
from teratron.config.errors import UserError, nearest
from teratron.config.keys import kind_name


def parse_overrides(arguments: Sequence[str]) -> dict[str, object]:
    """Read arguments that are config keys and nothing else; see `split_overrides`.

    Raises `UserError` also for an argument that belongs to no key.
    """
    overrides, rest = split_overrides(arguments)
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}': expected --section.key value, such as --model.layers 12")
    return overrides


def split_overrides(arguments: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Take the config keys out of a command line; return them with their values, and the arguments left over, in order.

    A key is an option with a dot: `--section.key value` or `--section.key=value`. Booleans also take `--section.key`,
    `--no-section.key` and `--section.no-key`; keys that are lists take every value up to the next option. Hyphens in a key equal
    underscores. Everything from a lone `--` on is left over. Values stay text (a tuple of text for a list), which `Config.override`
    converts; only the bare boolean forms are already True or False.

    Raises `UserError` for an unknown key (with the nearest right one), a missing value, and a key given twice with two values.
    """
    overrides: dict[str, object] = {}
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            return overrides, rest + list(arguments[position - 1 :])
        if not _is_key(argument):
            rest.append(argument)
            continue
        option, equals, text = argument.partition("=")
        name, positive = _resolve(option)
        if equals and not positive:
            raise UserError(f"{argument}: {option} takes no value; type {option} alone, or --{name}={text}")
        following = [] if equals else _values_after(arguments, position)
        value, used = _value(name, text if equals else None, following) if positive else (False, 0)
        position += used
        if overrides.setdefault(name, value) != value:
            raise UserError(f"--{name} is given twice, as {overrides[name]!r} and {value!r}: keep one")
    return overrides, rest


def _is_key(argument: str) -> bool:
    return argument.startswith("--") and "." in argument.partition("=")[0]


def _resolve(option: str) -> tuple[str, bool]:
    """The key that an option names, and False when it is the negative form of a boolean."""
    kinds = key_kinds()
    name = option.removeprefix("--").replace("-", "_")
    if name in kinds:
        return name, True
    section, _, leaf = name.partition(".")
    positive = name.removeprefix("no_") if name.startswith("no_") else f"{section}.{leaf.removeprefix('no_')}"
    if positive == name or positive not in kinds:
        raise UserError(f"unknown key '{option}'{nearest(positive, kinds)}; `teratron train --help` lists the keys")
    if kinds[positive] is not bool:
        raise UserError(f"{option}: {positive} is {kind_name(kinds[positive])}, not true|false; type --{positive} VALUE")
    return positive, False


def _values_after(arguments: Sequence[str], start: int) -> list[str]:
    """The arguments up to the next option; a single hyphen starts a value, such as a negative number."""
    stop = start
    while stop < len(arguments) and not arguments[stop].startswith("--"):
        stop += 1
    return list(arguments[start:stop])


def _value(name: str, text: str | None, following: list[str]) -> tuple[object, int]:
    """The value of a key, from the text after `=` or else from the arguments that follow, and how many of those it used."""
    kind = key_kinds()[name]
    is_list = kind == tuple[str, ...]
    if text is not None:
        return ((text,) if text else ()) if is_list else text, 0
    if kind is bool:
        given = bool(following) and following[0].lower() in ("true", "false")
        return (following[0], 1) if given else (True, 0)
    if not following:
        hint = f"; --{name}= empties it" if is_list else ""
        raise UserError(f"--{name} has no value: expected {kind_name(kind)}{hint}")
    return (tuple(following), len(following)) if is_list else (following[0], 1)
