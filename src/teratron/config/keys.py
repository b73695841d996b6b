"""The keys of a run: typed fields of frozen dataclasses, their checks, their documentation, and how text becomes a value."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from teratron.config.errors import UserError

Check = Callable[[Any], "str | None"]


def key(default: Any, *checks: Check) -> Any:
    """A config field with a default and the checks that protect it; each check returns what was expected, or None."""
    return dataclasses.field(default=default, metadata={"checks": checks})


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"at least {low}"


def above(low: float) -> Check:
    return lambda value: None if value > low else f"above {low}"


def between(low: float, high: float) -> Check:
    """A value in [low, high)."""
    return lambda value: None if low <= value < high else f"from {low} to below {high}"


class Section:
    """Base of the config sections: runs every field's own checks when an object is made, then the section's."""

    section: typing.ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = coerce(getattr(self, field.name), kind_of(type(self), field.name), f"{self.section}.{field.name}")
            object.__setattr__(self, field.name, value)
            for check in field.metadata.get("checks", ()):
                expected = check(value) if not isinstance(value, str) else None  # a word has no bounds
                if expected is not None:
                    raise UserError(f"{self.section}.{field.name} = {value}: expected {expected}")
        self.check()

    def check(self) -> None:
        """Checks that concern several fields of the section."""


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def kind_of(section: type, name: str) -> Any:
    """The declared type of a field: int, float, bool, str, tuple[str, ...], Literal[...], or a number or some words or any text."""
    return _hints(section)[name]


def kind_name(kind: Any) -> str:
    """How a type is called in help and errors, such as `int`, `true|false` or `cosine|linear`."""
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if _is_union(kind):
        return "|".join(map(kind_name, typing.get_args(kind)))
    if kind is bool:
        return "true|false"
    return "list of text" if kind == tuple[str, ...] else {int: "integer", float: "number", str: "text"}[kind]


def coerce(value: Any, kind: Any, name: str) -> Any:
    """Turn text or a TOML value into the declared type; refuse with the key, the value and what was expected."""
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise UserError(f"{name} = {value!r}: expected one of {', '.join(typing.get_args(kind))}")
    if _is_union(kind):
        number, words = typing.get_args(kind)
        if value in typing.get_args(words) or (words is str and isinstance(value, str) and not value.lstrip("+-").isdigit()):
            return value
        kind, expected = number, f"{kind_name(number)} or {' or '.join(typing.get_args(words)) or 'text'}"
    else:
        expected = kind_name(kind)
    if kind == tuple[str, ...]:
        if isinstance(value, str):
            value = (value,) if value else ()
        plain = isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float, os.PathLike)) for item in value)
        if not plain or "" in value:  # an empty name would be the current folder
            raise UserError(f"{name} = {value!r}: expected {kind_name(kind)}")
        return tuple(coerce(str(item), str, name) for item in value)
    try:
        return _scalar(value, kind)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise UserError(f"{name} = {value!r}: expected {expected}") from None


def _is_union(kind: Any) -> bool:
    """Whether a type is a number or words, as `int | Literal["auto"]` or `int | str`."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _scalar(value: Any, kind: Any) -> Any:
    """Convert to bool, int, float or str; raises ValueError for anything that is not plainly one."""
    if kind is str and isinstance(value, str):
        value.encode("utf-8")  # raises ValueError for a file name that is not UTF-8: config.toml could not hold it
        return value
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
    if kind is str or isinstance(value, bool):
        raise ValueError
    if kind is float:
        if not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    whole = isinstance(value, int) or (isinstance(value, str) and value.lstrip("+-").isdigit())
    number = int(value) if whole else float(value)
    if number != int(number):
        raise ValueError
    return int(number)


@functools.cache
def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    body = list(ast.iter_child_nodes(definition))
    docs: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
