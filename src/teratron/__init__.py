"""Teratron: transformer language models of any size, from a laptop to thousands of GPUs."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Config": "teratron.config",
    "UserError": "teratron.config",
    "Trainer": "teratron.train",
    "build_model": "teratron.models",
    "generate": "teratron.generate",
    "load_tokenizer": "teratron.data",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import teratron` and `teratron --help` stay instant."""
    if name not in _WHERE:
        raise AttributeError(f"module 'teratron' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
