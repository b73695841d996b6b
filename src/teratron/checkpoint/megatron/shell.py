"""Launch scripts read without being run: assignments, arrays, expansions and quotes of a shell, and the words of the last command.

What stands in conditions and loops is left out, as nothing says whether it would be done. What a script does not set stays as `${NAME}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from teratron.checkpoint.megatron.arithmetic import evaluate
from teratron.config import UserError

_ASSIGNMENT = re.compile(r"(?:(?:export|local|readonly|declare(?:\s+-\w+)*)\s+)?([A-Za-z_]\w*)(\+?)=")
_OPENS, _CLOSES = re.compile(r"(if|case|for|while|until)\b"), re.compile(r"(fi|esac|done)\b")
_STREAM = re.compile(r"\d*(>>?|<)(&?\d*)")
"""The redirection of a stream, without its file."""
_NAME = re.compile(r"(?<!\\)\$(?:\{([^{}]*)\}|([A-Za-z_]\w*|[0-9@*#?]))")
_DEFAULT = re.compile(r"([A-Za-z_]\w*|\d+)(?::?[-=])(.*)$", re.DOTALL)


def read_script(path: Path) -> tuple[list[str], list[str]]:
    """The words of the command that starts Megatron-LM, arguments expanded, also of a file that is a list of arguments.

    And the arguments that stand in conditions and loops, which are left out.

    Raises `UserError` for a file that cannot be read or holds no such command.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: not a readable script: {error}") from None
    variables: dict[str, list[str]] = {}
    found: list[str] = []
    depth, left_out = 0, list[str]()
    for statement in statements(text):
        depth += bool(_OPENS.match(statement)) - (depth > 0 and bool(_CLOSES.match(statement)))
        left_out += re.findall(r"(?<![\w-])--[a-z][\w-]*", statement) if depth else []
        words = _run(statement, variables) if not depth else []
        if any(word.endswith(".py") for word in words) or (words and words[0].startswith("--")):
            found = words
    if not any(word.startswith("--") for word in found):
        raise UserError(f"{path}: no command with arguments such as --num-layers 24: expected the script that starts Megatron-LM")
    plain = [w for before, w in zip(["", *found], found, strict=False) if not _STREAM.match(w) and before not in (">", ">>", "<", "2>")]
    return plain, left_out


def statements(text: str) -> Iterator[str]:
    """The statements of a script, without comments; quotes, lists in parentheses and continued lines stay together."""
    text, found, depth, quote, place = text.replace("\\\r\n", " ").replace("\\\n", " "), "", 0, "", 0
    while place < len(text):
        character = text[place]
        if quote:
            quote = "" if character == quote else quote
        elif character == "\\":
            found, place = found + text[place : place + 2], place + 2
            continue
        elif character in "'\"`":
            quote = character
        elif character in "()":
            depth = max(0, depth + (1 if character == "(" else -1))
        elif character == "#" and (not found or found[-1].isspace() or found[-1] == "("):
            end = text.find("\n", place)
            place = len(text) if end < 0 else end
            continue
        elif not depth and character in "\n;&|" and not (character == "&" and found.endswith(">")):
            yield from filter(None, [found.strip()])
            found, place = "", place + 1
            continue
        found, place = found + character, place + 1
    yield from filter(None, [found.strip()])


def _run(statement: str, variables: dict[str, list[str]]) -> list[str]:
    """Keep what a statement assigns; returns the words of the command behind that."""
    while assigned := _ASSIGNMENT.match(statement):
        name, adds, rest = assigned[1], bool(assigned[2]), statement[assigned.end() :]
        if rest.startswith("("):
            values, statement = split_words(rest[1 : rest.rfind(")")], variables), ""
        else:
            end = _end_of_word(rest)
            values, statement = (
                [" ".join(split_words(f'"{rest[:end]}"' if rest[:1] not in "'\"" else rest[:end], variables))],
                rest[end:].strip(),
            )
        if adds and len(values) == 1 and len(variables.get(name, ())) == 1 and not rest.startswith("("):
            values = [variables[name][0] + values[0]]
        elif adds:
            values = variables.get(name, []) + values
        variables[name] = values
    return split_words(statement, variables)


def _end_of_word(text: str) -> int:
    """Where the first word ends."""
    quote, depth, place = "", 0, 0
    while place < len(text):
        character = text[place]
        if character == "\\" and quote != "'":
            place += 1
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"`":
            quote = character
        elif character in "({":
            depth += 1
        elif character in ")}":
            depth -= 1
        elif character.isspace() and depth <= 0:
            return place
        place += 1
    return len(text)


def split_words(text: str, variables: Mapping[str, list[str]]) -> list[str]:
    """The words of a text, its variables expanded; a word in quotes stays one, but for "${LIST[@]}"."""
    words: list[str] = []
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        end = place + _end_of_word(text[place:])
        words += _expanded(text[place:end], variables)
        place = end
    return words


def _expanded(word: str, variables: Mapping[str, list[str]]) -> list[str]:
    """What one word of the script becomes."""
    whole = re.fullmatch(r'"?\$\{([A-Za-z_]\w*)\[[@*]\]\}"?', word)
    if whole:
        return list(variables.get(whole[1], [word.strip('"')]))
    found, splits = "", False
    for literal, double, bare in re.findall(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|((?:\\.|[^'"\\])+)""", word):
        if literal:
            found += literal
        elif double:
            found += _substituted(double, variables)
        else:
            expanded = _substituted(bare, variables)
            splits |= expanded != bare
            found += expanded
    return found.split() if splits else [found]


def _substituted(text: str, variables: Mapping[str, list[str]]) -> str:
    """Variables and sums replaced by their values; what the script does not set stays."""

    def value(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        default = _DEFAULT.match(name)
        name = default[1] if default else re.sub(r"\[[@*0]\]$", "", name)
        if name in variables:
            return " ".join(variables[name])
        return _substituted(default[2], variables) if default else f"${{{name}}}"

    text = re.sub(r"\$\(\((.*?)\)\)", lambda match: _sum(match[1], variables), text, flags=re.DOTALL)
    return re.sub(r"\\(.)", r"\1", _NAME.sub(value, text))


def _sum(text: str, variables: Mapping[str, list[str]]) -> str:
    """The value of a sum of whole numbers; what is more than that stays."""
    names = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda match: " ".join(variables.get(match[1], [match[0]])), text)
    try:
        return str(evaluate(names))
    except ValueError:
        return f"$(({text}))"


def parse_flags(words: list[str]) -> dict[str, list[str]]:
    """Arguments by name, with `_` for `-`, each with the words behind it."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif name:
            found[name].append(word)
    return found
