"""Ranks that act together: what one rank cannot do, all refuse with the same sentence, so that none waits for one that has left."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from teratron.config import UserError
from teratron.parallel.mesh import Group

ALONE = Group()
"""A single process."""


def gather_json(group: Group, value: Any) -> list[Any]:
    """Every rank's JSON value, in rank order; a collective. Nothing is pickled."""
    return [json.loads(text) for text in group.gather_bytes(json.dumps(value).encode())]


def agree(group: Group, action: Callable[[], Any]) -> list[Any]:
    """Run an action on every rank, and return all their JSON results in rank order once all are done; a collective.

    Raises on every rank the `UserError` of the first rank that raised one. Anything else is a defect and takes its rank down.
    """
    try:
        report = {"result": action()}
    except UserError as error:
        report = {"error": str(error)}
    reports = gather_json(group, report)
    for found in reports:
        if "error" in found:
            raise UserError(found["error"])
    return [found["result"] for found in reports]
