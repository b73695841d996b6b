"""How conversations are written down: templates as data, and turns as token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from teratron.config import UserError, nearest
from teratron.data.tokenizer import Tokenizer

END = "{end}"
"""In a template: the tokenizer's end of a document."""


@dataclass(frozen=True)
class Template:
    """What stands before and after what each role says. Marks that the tokenizer has as tokens are those tokens, else plain text."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    begin: str = ""
    """What a conversation begins with."""
    within: str = ""
    """How the first user's turn takes in what the system says, where that has no turn of its own."""
    telling: str = ""
    """The token by which a tokenizer shows that it is for this template."""

    @property
    def stop(self) -> str:
        """The text with which an answer ends, where that is no end of a document."""
        return self.after["assistant"].strip().replace(END, "")


def _chatml(role: str) -> str:
    return f"<|im_start|>{role}\n"


def _llama3(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


ROLES = ("system", "user", "assistant")
TEMPLATES: dict[str, Template] = {
    "text": Template({"user": "", "assistant": ""}, {"user": "", "assistant": END}, within="{system} {user}"),
    "plain": Template(
        {"system": "", "user": "User: ", "assistant": "Assistant:"}, {"system": "\n", "user": "\n", "assistant": END}, telling=""
    ),
    "chatml": Template(
        {role: _chatml(role) for role in ROLES}, dict.fromkeys(ROLES, "<|im_end|>\n"), telling="<|im_start|>"
    ),
    "llama2": Template(
        {"user": "[INST] ", "assistant": ""}, {"user": " [/INST]", "assistant": END}, within="<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
    ),
    "llama3": Template(
        {role: _llama3(role) for role in ROLES}, dict.fromkeys(ROLES, "<|eot_id|>"), "<|begin_of_text|>", telling="<|start_header_id|>"
    ),
}  # fmt: skip
MARK = re.compile(r"(\{end\}|<\|\w+\|>)")


def template_of(name: str, tokenizer: Tokenizer) -> Template:
    """A template by its name; with auto the one whose tokens the tokenizer has, else plain. Raises `UserError` for another name."""
    if name == "auto":
        fitting = (t for t in TEMPLATES.values() if t.telling and tokenizer.token_id(t.telling) is not None)
        return next(fitting, TEMPLATES["plain"])
    if name not in TEMPLATES:
        raise UserError(f"--template {name}: expected auto, {', '.join(TEMPLATES)}{nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


@dataclass(frozen=True)
class Turn:
    """What one role says, as token ids."""

    role: str
    before: np.ndarray
    content: np.ndarray
    after: np.ndarray

    @property
    def size(self) -> int:
        """Tokens of all of it."""
        return len(self.before) + len(self.content) + len(self.after)


class Writer:
    """Writes conversations down for one tokenizer."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.begin = self._marks(template.begin)
        if not len(self.begin) and tokenizer.bos is not None:
            self.begin = np.array([tokenizer.bos])

    def turns(self, messages: Sequence[Mapping[str, str]]) -> list[Turn]:
        """Messages of role and content, as token ids. Text is only text: a mark that is spelled out in a content is no mark."""
        said = [(message["role"], message["content"]) for message in messages]
        if self.template.within and said[0][0] == "system":
            asked = said[1][1] if len(said) > 1 and said[1][0] == "user" else ""
            first = self.template.within.replace("{system}", said[0][1]).replace("{user}", asked)
            said = [("user", first), *said[1 + bool(asked) :]]
        contents = self.tokenizer.encode_batch([self._spaced(role, content) for role, content in said])
        return [Turn(role, self.before(role), np.array(ids, np.int64), self._marks(self.template.after[role]))
                for (role, _), ids in zip(said, contents, strict=True)]  # fmt: skip

    def before(self, role: str) -> np.ndarray:
        """What stands before what a role says: a reply is written behind the assistant's."""
        return self._marks(self.template.before[role])

    def _spaced(self, role: str, content: str) -> str:
        """A space between a plain mark and what is said belongs to the latter, as in any text."""
        before = self.template.before[role]
        bare = before.endswith(":") or (not before and role == "assistant")
        return f" {content}" if bare else content

    def _marks(self, text: str) -> np.ndarray:
        """Ids of a template's own text."""
        ids: list[int] = []
        for piece in filter(None, MARK.split(text)):
            token = self.tokenizer.eod if piece == END else self.tokenizer.token_id(piece) if MARK.fullmatch(piece) else None
            ids += self.tokenizer.encode(piece) if token is None else [token]
        return np.array(ids, np.int64)
