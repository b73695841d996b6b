"""Conversations as files have them: messages of role and content, of from and value, or an instruction with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from teratron.config import UserError, nearest
from teratron.tasks.finetune.rows import Row

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""What files call the three roles."""
Messages = list[dict[str, str]]


def conversations(row: Row, name: str) -> list[Messages]:
    """Those of a row, each of which ends with what the assistant says. Raises `UserError` that names the row."""
    if row.get("messages") is not None:
        return [messages_of(row["messages"], name)]
    if row.get("instruction") is None:
        raise UserError(
            f"{name}: has neither messages nor an instruction: expected 'messages' [{{role, content}}], 'conversations' [{{from, value}}], "
            "or 'instruction', 'input' and 'output': name the column with --columns messages=COLUMN"
        )
    instances = row["instances"] if row.get("instances") is not None else [row]
    if not isinstance(instances, Sequence) or not all(isinstance(one, dict) for one in instances):
        raise UserError(f"{name}: 'instances' is {str(instances)[:60]!r}, expected a list of objects with input and output")
    return [_answered(row["instruction"], one, name) for one in instances]


def _answered(instruction: Any, instance: Row, name: str) -> Messages:
    given, output = instance.get("input"), instance.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(given or "", str):
        raise UserError(f"{name}: expected texts as instruction, input and output, found an output of {str(output)[:60]!r}: correct it")
    asked = f"{instruction}\n\n{given}" if given and given.strip() else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def messages_of(found: Any, name: str) -> Messages:
    """A list of messages up to the last one of the assistant, in roles of ours. Raises `UserError` that names the row."""
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise UserError(f"{name}: messages are {str(found)[:60]!r}, expected a list of objects with role and content")
    messages = [_message(message, name) for message in found]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{name}: the assistant answers no user in it: expected messages of both roles, or leave the example out")
    return messages


def _message(message: Row, name: str) -> dict[str, str]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{name}: a message is {str(message)[:60]!r}, expected texts as role and content (or from and value): correct it")
    if role.lower() not in ROLES:
        raise UserError(f"{name}: role {role!r}: expected {', '.join(ROLES)}{nearest(role.lower(), ROLES)}")
    return {"role": ROLES[role.lower()], "content": content}
