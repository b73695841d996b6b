"""What a measurement must be read with: the machine, the versions, the moment; and the file that measurements are added to."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from teratron.config import UserError
from teratron.train.device import describe


def facts(device: str) -> dict[str, Any]:
    """Machine, versions, and the load when the measurement ended (processes that wanted a core in the last minute)."""
    versions = {name: _version(name) for name in ("teratron", "torch", "numpy", "transformers")}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe(torch.device(device), torch.float32),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def add_line(path: Path, record: dict[str, Any]) -> None:
    """Append a record as one JSON line. Raises `UserError` when the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}; choose another file") from None
